/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * What leaves the node, at the egress of the VXLAN device and of the node's links. Judges the egress of pods whose
 * packets went to a Service and have been translated by now. Everything else passes untouched.
 */

SEC("classifier")
int to_wire(struct __sk_buff *skb)
{
	struct endpoint *sender;
	struct packet packet = {};
	struct basis basis = {};
	struct eth_header eth;
	int reason;

	if (!(skb->mark & MARK_DEFERRED) || !skb->ingress_ifindex)
		return TCX_NEXT;
	sender = deferred_by(skb);
	if (!sender) {
		count(EGRESS, REASON_NO_ENDPOINT);
		return TCX_DROP;
	}
	/* Once is enough: the VXLAN packet around it has the same mark. */
	skb->mark &= ~(MARK_SLOT_MASK | MARK_DEFERRED);
	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return TCX_DROP;
	/* Pods send nothing else that could be translated. */
	if (eth.type != bpf_htons(ETH_P_IP))
		return act(skb, sender, &packet, EGRESS, REASON_OTHER_PROTOCOL, &basis);
	reason = parse_packet(skb, sender->uid, EGRESS, 0, &packet);
	if (!reason) {
		/* Masquerade may have changed it. */
		packet.saddr = sender->addr;
		reason = packet.is_error ? REASON_DEFERRED : judge_deferred(sender, &packet, &basis);
	}
	return act(skb, sender, &packet, EGRESS, reason, &basis);
}
