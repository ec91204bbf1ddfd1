/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * What a pod receives, at the egress of the host end of its veth. Judges the pod's ingress, and before that the egress of
 * a pod of this node that reached this one through a Service.
 */

/* A frame that is not plain. 0, or the reason for which it passes or is dropped at once. */
static __always_inline int parse_to_pod(struct __sk_buff *skb, const struct endpoint *endpoint, struct packet *packet)
{
	struct body body = {};
	struct eth_header eth;
	__u8 family;
	int reason;

	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return REASON_MALFORMED;
	/* Senders are checked where they send. */
	if (eth.type == bpf_htons(ETH_P_ARP) && !skb->vlan_present)
		return REASON_ARP;
	family = family_of(eth.type);
	if (!family || skb->vlan_present)
		return REASON_OTHER_PROTOCOL;
	reason = parse_addresses(skb, sizeof(eth), family, packet, &body);
	if (reason)
		return reason;
	if (!is_own(endpoint, family, &packet->daddr) && !(family == FAMILY_IPV6 && is_multicast(&packet->daddr)))
		return REASON_NOT_MINE;
	reason = parse_body(skb, endpoint->uid, INGRESS, packet, &body);
	if (reason)
		return reason;
	if (family == FAMILY_IPV6) {
		if (is_of_link(packet, &body))
			return REASON_NEIGHBOUR;
		/* Other multicast is not forwarded to pods, in either family. */
		if (is_multicast(&packet->daddr))
			return REASON_NOT_MINE;
	}
	return 0;
}

static __always_inline int read_to_pod(struct __sk_buff *skb, const struct endpoint *endpoint, struct packet *packet)
{
	struct plain_frame frame;

	if (!plain_frame(skb, 0, &frame))
		return parse_to_pod(skb, endpoint, packet);
	parse_plain(&frame, packet);
	/* Bridges flood. */
	return packet->daddr.words[0] == endpoint->addr ? 0 : REASON_NOT_MINE;
}

/* `known_only`: as in from_pod. */
static __always_inline int judge_to_pod(struct __sk_buff *skb, const struct endpoint *endpoint, struct packet *packet,
					struct basis *basis, int known_only)
{
	struct endpoint *sender;
	struct flow_key key;
	__u8 flags = 0;
	int reason, full;

	/* Born in this node's namespace: the kubelet and whatever else runs there. Masqueraded traffic has the node's
	 * address too, but came in by some link.
	 */
	if (!skb->ingress_ifindex)
		return REASON_NODE;

	sender = deferred_by(skb);
	if (sender && sender->uid == endpoint->uid)
		return REASON_HAIRPIN;
	flow_key(endpoint, packet, INGRESS, &key);
	if (endpoint->state == ENDPOINT_READY) {
		reason = is_known(endpoint, packet, &key, INGRESS, &flags, basis);
		if (is_drop(reason))
			return reason;
		/* An answer from behind a Service was let out by the sender's own entry. */
		if (reason >= 0 && !sender)
			return reason;
		if (known_only)
			return REASON_UNDECIDED;
	} else {
		reason = -1;
	}
	if (sender) {
		struct basis senders = {};
		int egress = judge_deferred(sender, packet, &senders);

		if (is_drop(egress)) {
			act(skb, sender, packet, EGRESS, egress, &senders);
			*basis = senders;
			return egress;
		}
		if (reason >= 0)
			return reason;
	}
	if (packet->is_error && is_related(skb, endpoint, packet, INGRESS))
		return REASON_RELATED;
	/* What `is_known` left there is another flow's. */
	flags = goes_on(packet) ? FLOW_EITHER : 0;
	reason = flags ? judge_either(endpoint, &key, INGRESS, basis) : judge_opening(endpoint, &key, INGRESS, basis);
	if (is_drop(reason))
		return reason;
	full = remember(endpoint, &key, INGRESS, packet->tcp_flags, flags);
	return full ? full : reason;
}

SEC("classifier")
int to_pod(struct __sk_buff *skb)
{
	struct row row;
	struct packet packet = {};
	struct basis basis = {};
	int reason;

	if (!read_endpoint(skb->ifindex, &row)) {
		count(INGRESS, REASON_NO_ENDPOINT);
		return TCX_DROP;
	}
	reason = read_to_pod(skb, &row.endpoint, &packet);
	if (!reason)
		reason = judge_to_pod(skb, &row.endpoint, &packet, &basis, 0);
	return act(skb, &row.endpoint, &packet, INGRESS, reason, &basis);
}
