/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * What leaves the node, at the egress of the VXLAN device and of the node's links. Judges the egress of pods whose
 * packets went to a Service and have been translated by now. Everything else passes untouched.
 */

static __always_inline void own_address(const struct endpoint *sender, struct packet *packet)
{
	if (packet->family == FAMILY_IPV6)
		packet->saddr = sender->addr6;
	else
		packet->saddr.words[0] = sender->addr;
}

static __always_inline int is_upgrade(void)
{
	__u32 zero = 0;
	struct config *config = bpf_map_lookup_elem(&settings, &zero);

	return config && config->has_former;
}

SEC("classifier")
int to_wire(struct __sk_buff *skb)
{
	struct endpoint *sender;
	struct packet packet = {};
	struct basis basis = {};
	struct body body = {};
	struct eth_header eth;
	__u8 family;
	int reason;

	if (!(skb->mark & MARK_DEFERRED) || !skb->ingress_ifindex)
		return TCX_NEXT;
	sender = deferred_by(skb);
	if (!sender) {
		/* It is judged there, and the mark with it. */
		if (is_upgrade())
			return TCX_NEXT;
		count(EGRESS, REASON_NO_ENDPOINT);
		return TCX_DROP;
	}
	/* Once is enough: the VXLAN packet around it has the same mark. */
	skb->mark &= ~(MARK_SLOT_MASK | MARK_DEFERRED);
	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return TCX_DROP;
	family = family_of(eth.type);
	/* Pods send nothing else that could be translated. */
	if (!family)
		return act(skb, sender, &packet, EGRESS, REASON_OTHER_PROTOCOL, &basis);
	reason = parse_addresses(skb, sizeof(eth), family, &packet, &body);
	if (!reason)
		reason = parse_body(skb, sender->uid, EGRESS, &packet, &body);
	if (!reason) {
		/* Masquerade may have changed it. */
		own_address(sender, &packet);
		reason = packet.is_error ? REASON_DEFERRED : judge_deferred(sender, &packet, &basis);
	}
	return act(skb, sender, &packet, EGRESS, reason, &basis);
}
