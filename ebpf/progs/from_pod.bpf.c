/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * What a pod sends, at the ingress of the host end of its veth. Judges the pod's egress; where the destination is a
 * Service or the node (which may be a NodePort), the real destination is not known yet: netfilter translates later. The
 * packet is then marked with the pod's slot, and to_pod or to_wire judge it. A packet that is not translated reaches
 * nothing but this node, which is always allowed.
 */

/* Reason to drop an ARP packet, or REASON_ARP. */
static __always_inline int check_arp(struct __sk_buff *skb, const struct endpoint *endpoint)
{
	struct arp_packet arp;
	__be32 sender;

	if (bpf_skb_load_bytes(skb, sizeof(struct eth_header), &arp, sizeof(arp)))
		return REASON_MALFORMED;
	__builtin_memcpy(&sender, arp.sender_addr, sizeof(sender));
	/* A probe for a duplicate has no sender's address yet (RFC 5227 §1.1). */
	if (sender != endpoint->addr && sender != 0)
		return REASON_SPOOF;
	return is_same_mac(arp.sender_mac, endpoint->mac) ? REASON_ARP : REASON_SPOOF;
}

/* Whether the pod may have sent what has this source. One that is still looking for its address has none; its word is then
 * to its link (`check_neighbour`), as everything is that comes from a link-local address and is not for the node.
 */
static __always_inline int is_own_source(const struct endpoint *endpoint, const struct packet *packet)
{
	return is_own(endpoint, packet->family, &packet->saddr) ||
	       (packet->family == FAMILY_IPV6 && is_unspecified(&packet->saddr));
}

/* No pod speaks VXLAN to a node: it could put frames into any pod's network. */
static __always_inline int is_encapsulated(const struct packet *packet, __u32 daddr_flags)
{
	struct config *config;
	__u32 zero = 0;

	if (packet->protocol != IPPROTO_UDP || !(daddr_flags & (ADDRESS_NODE | ADDRESS_REMOTE_NODE)))
		return 0;
	config = bpf_map_lookup_elem(&settings, &zero);
	return config && packet->dport == config->vxlan_port;
}

/* Whether the packet may be the first of a flow. */
static __always_inline int opens(const struct packet *packet)
{
	if (packet->protocol == IPPROTO_TCP)
		return begins(packet);
	if (packet->protocol == IPPROTO_ICMPV6)
		return packet->icmp_type == ICMPV6_ECHO;
	return !packet->is_error && !(packet->protocol == IPPROTO_ICMP && packet->sport == bpf_htons(ICMP_ECHO));
}

/* A frame that is not plain. 0, or the reason for which it passes or is dropped at once. */
static __always_inline int parse_from_pod(struct __sk_buff *skb, const struct endpoint *endpoint, struct packet *packet)
{
	struct body body = {};
	struct eth_header eth;
	__u8 family;
	int reason;

	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return REASON_MALFORMED;
	if (!is_same_mac(eth.from, endpoint->mac))
		return REASON_SPOOF;
	if (skb->vlan_present)
		return REASON_OTHER_PROTOCOL;
	if (eth.type == bpf_htons(ETH_P_ARP))
		return check_arp(skb, endpoint);
	family = family_of(eth.type);
	if (!family)
		return REASON_OTHER_PROTOCOL;
	reason = parse_addresses(skb, sizeof(eth), family, packet, &body);
	if (reason)
		return reason;
	if (!is_own_source(endpoint, packet))
		return REASON_SPOOF;
	reason = parse_body(skb, endpoint->uid, EGRESS, packet, &body);
	if (reason)
		return reason;
	if (family != FAMILY_IPV6)
		return 0;
	reason = check_neighbour(skb, endpoint, packet, &body);
	return reason >= 0 ? reason : 0;
}

/* Who speaks to whom in a frame of the pod. 0, or the reason for which it passes or is dropped at once. */
static __always_inline int read_from_pod(struct __sk_buff *skb, const struct endpoint *endpoint, struct packet *packet)
{
	struct plain_frame frame;

	if (!plain_frame(skb, 0, &frame))
		return parse_from_pod(skb, endpoint, packet);
	if (!is_same_mac(frame.eth->from, endpoint->mac))
		return REASON_SPOOF;
	parse_plain(&frame, packet);
	return is_own_source(endpoint, packet) ? 0 : REASON_SPOOF;
}

/* `known_only`: REASON_UNDECIDED for what is not of a known flow; nothing is remembered then. */
static __always_inline int judge_from_pod(struct __sk_buff *skb, const struct endpoint *endpoint, struct packet *packet,
					  __u8 *flags, struct basis *basis, int known_only)
{
	struct flow_key key;
	__u32 daddr_flags;
	int reason, full;

	flow_key(endpoint, packet, EGRESS, &key);
	if (endpoint->state == ENDPOINT_READY) {
		reason = is_known(endpoint, packet, &key, EGRESS, flags, basis);
		if (reason >= 0)
			return reason;
	}
	if (known_only)
		return REASON_UNDECIDED;
	daddr_flags = address_flags(packet);
	/* Neighbours are no peers of any policy. */
	if (packet->family == FAMILY_IPV6 &&
	    (is_unspecified(&packet->saddr) || (is_link_local(&packet->saddr) && !(daddr_flags & ADDRESS_NODE))))
		return REASON_SPOOF;
	if (is_encapsulated(packet, daddr_flags))
		return REASON_ENCAPSULATION;
	if (packet->is_error && is_related(skb, endpoint, packet, EGRESS))
		return REASON_RELATED;
	if (daddr_flags & ADDRESS_NODE) {
		*flags = FLOW_DEFERRED;
		reason = REASON_NODE;
		/* Behind a NodePort is somebody else, whose answers come in. Answers to the node itself begin nothing. */
		if (endpoint->state != ENDPOINT_READY || !opens(packet))
			return reason;
	} else if (daddr_flags & ADDRESS_SERVICE && endpoint->state == ENDPOINT_READY) {
		*flags = FLOW_DEFERRED;
		reason = REASON_DEFERRED;
	} else if (goes_on(packet)) {
		*flags = FLOW_EITHER;
		reason = judge_either(endpoint, &key, EGRESS, basis);
	} else {
		reason = judge_opening(endpoint, &key, EGRESS, basis);
	}
	if (is_drop(reason))
		return reason;
	full = remember(endpoint, &key, EGRESS, packet->tcp_flags, *flags);
	return full ? full : reason;
}

SEC("classifier")
int from_pod(struct __sk_buff *skb)
{
	struct row row;
	struct packet packet = {};
	struct basis basis = {};
	__u8 flags = 0;
	int reason;

	if (!read_endpoint(skb->ifindex, &row)) {
		count(EGRESS, REASON_NO_ENDPOINT);
		return TCX_DROP;
	}
	reason = read_from_pod(skb, &row.endpoint, &packet);
	if (!reason)
		reason = judge_from_pod(skb, &row.endpoint, &packet, &flags, &basis, 0);
	skb->mark = row.endpoint.slot << MARK_SLOT_SHIFT | (flags & FLOW_DEFERRED ? MARK_DEFERRED : 0);
	return act(skb, &row.endpoint, &packet, EGRESS, reason, &basis);
}
