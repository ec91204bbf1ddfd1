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

/* A pod that says it is a router would get its neighbours' packets (CVE-2020-10749). */
static __always_inline int is_router_advertisement(struct __sk_buff *skb)
{
	__u8 next = 0, type = 0;

	bpf_skb_load_bytes(skb, sizeof(struct eth_header) + IPV6_NEXT_HEADER, &next, sizeof(next));
	bpf_skb_load_bytes(skb, sizeof(struct eth_header) + IPV6_HEADER_LEN, &type, sizeof(type));
	return next == IPPROTO_ICMPV6 && type == ICMPV6_ROUTER_ADVERTISEMENT;
}

/* No pod speaks VXLAN to a node: it could put frames into any pod's network. */
static __always_inline int is_encapsulated(const struct packet *packet, __u32 daddr_flags)
{
	__u32 zero = 0;
	struct config *config = bpf_map_lookup_elem(&settings, &zero);

	return config && packet->protocol == IPPROTO_UDP && packet->dport == config->vxlan_port &&
	       daddr_flags & (ADDRESS_NODE | ADDRESS_REMOTE_NODE);
}

/* Whether the packet may be the first of a flow. */
static __always_inline int opens(const struct packet *packet)
{
	if (packet->protocol == IPPROTO_TCP)
		return begins(packet);
	return !packet->is_error && !(packet->protocol == IPPROTO_ICMP && packet->sport == bpf_htons(ICMP_ECHO));
}

static __always_inline int decide_from_pod(struct __sk_buff *skb, const struct endpoint *endpoint, struct packet *packet,
					   __u8 *flags, struct basis *basis)
{
	struct eth_header eth;
	struct flow_key key;
	__u32 daddr_flags;
	int reason, full;

	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return REASON_MALFORMED;
	if (!is_same_mac(eth.from, endpoint->mac))
		return REASON_SPOOF;
	if (skb->vlan_present)
		return REASON_OTHER_PROTOCOL;
	if (eth.type == bpf_htons(ETH_P_ARP))
		return check_arp(skb, endpoint);
	if (eth.type == bpf_htons(ETH_P_IPV6))
		return is_router_advertisement(skb) ? REASON_SPOOF : judge_ipv6(endpoint, EGRESS);
	if (eth.type != bpf_htons(ETH_P_IP))
		return REASON_OTHER_PROTOCOL;
	reason = parse_packet(skb, endpoint->uid, EGRESS, 0, packet);
	if (reason)
		return reason;
	if (packet->saddr != endpoint->addr)
		return REASON_SPOOF;

	flow_key(endpoint, packet, EGRESS, &key);
	if (endpoint->state == ENDPOINT_READY) {
		reason = is_known(endpoint, packet, &key, flags, basis);
		if (reason >= 0)
			return reason;
	}
	daddr_flags = address_flags(packet->daddr);
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
	} else {
		reason = judge_flow(endpoint, &key, basis);
	}
	if (is_drop(reason))
		return reason;
	full = remember(endpoint, &key, packet->tcp_flags, *flags, basis);
	return full ? full : reason;
}

SEC("classifier")
int from_pod(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct endpoint *endpoint = bpf_map_lookup_elem(&endpoints, &ifindex);
	struct packet packet = {};
	struct basis basis = {};
	__u8 flags = 0;
	int reason;

	if (!endpoint) {
		count(EGRESS, REASON_NO_ENDPOINT);
		return TCX_DROP;
	}
	reason = decide_from_pod(skb, endpoint, &packet, &flags, &basis);
	skb->mark = endpoint->slot << MARK_SLOT_SHIFT | (flags & FLOW_DEFERRED ? MARK_DEFERRED : 0);
	return act(skb, endpoint, &packet, EGRESS, reason, &basis);
}
