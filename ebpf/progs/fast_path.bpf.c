/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * The short way through the node: from the link where a packet comes in to the one where it leaves, past bridge, netfilter
 * and routing. include/fast_path.h says when it is taken.
 *
 * `fast_enter` stands before from_pod and spares it: it asks the same question itself, and remembers the answer as long as
 * the pod's policies are the same. `fast_leave` stands behind all others.
 */
#include "include/fast_tunnel.h"

static __always_inline int is_valid(const struct fast_verdict *verdict, const struct endpoint *endpoint)
{
	return verdict->uid == endpoint->uid && verdict->generation == endpoint->generation &&
	       endpoint->state == ENDPOINT_READY;
}

static __always_inline void keep(struct fast_verdict *verdict, const struct endpoint *endpoint, int reason)
{
	if (reason != REASON_ESTABLISHED)
		return;
	verdict->generation = endpoint->generation;
	verdict->uid = endpoint->uid;
}

/* What the policy of the receiving pod says; the same as at its link. `known_only`: REASON_UNDECIDED if that is not certain,
 * and to_pod decides, at the end of the whole way.
 */
static __always_inline int fast_judge(struct __sk_buff *skb, const struct fast_frame *frame, int family,
				      const struct endpoint *endpoint, struct fast_flow *flow, int known_only)
{
	struct packet packet = {};
	struct basis basis = {};
	int reason = REASON_NOT_MINE;

	if (is_valid(&flow->got, endpoint)) {
		count(INGRESS, REASON_ESTABLISHED);
		return TCX_NEXT;
	}
	fast_packet(frame, family, &packet);
	if (is_own(endpoint, family, &packet.daddr))
		reason = judge_to_pod(skb, endpoint, &packet, &basis, known_only);
	keep(&flow->got, endpoint, reason);
	if (known_only && reason != REASON_ESTABLISHED)
		return REASON_UNDECIDED;
	return act(skb, endpoint, &packet, INGRESS, reason, &basis);
}

/* Whether the sending pod may go on with the flow. If that is not certain, from_pod comes next and decides. */
static __always_inline int may_send(struct __sk_buff *skb, const struct fast_frame *frame, int family, struct fast_flow *flow)
{
	__u32 ifindex = skb->ifindex;
	struct row *row = bpf_map_lookup_elem(&endpoints, &ifindex);
	struct endpoint *endpoint;
	struct packet packet = {};
	struct basis basis = {};
	__u8 flags = 0;
	int reason;

	/* No pod's link: the packet comes from another node, which has judged it. */
	if (!row)
		return !flow->is_sent;
	endpoint = &row->endpoint;
	if (is_valid(&flow->sent, endpoint)) {
		count(EGRESS, REASON_ESTABLISHED);
		return 1;
	}
	fast_packet(frame, family, &packet);
	if (!is_same_mac(frame->eth->from, endpoint->mac) || !is_own(endpoint, family, &packet.saddr))
		return 0;
	reason = judge_from_pod(skb, endpoint, &packet, &flags, &basis, 1);
	if (reason != REASON_ESTABLISHED || flags & FLOW_DEFERRED)
		return 0;
	keep(&flow->sent, endpoint, reason);
	return 1;
}

/* The headers of a VXLAN packet and of what is in it are to lie in the buffer's first part: over IPv6 they are longer than what
 * some links put there. 0 if they cannot.
 */
static __always_inline int bring_near(struct __sk_buff *skb, struct fast_frame *outer, int family)
{
	__u8 *start = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	const __u32 want = VXLAN_ROOM_IPV6 + LONGEST_IPV6;

	if (family != FAMILY_IPV6)
		return 1;
	if (start + want > end &&
	    (bpf_skb_pull_data(skb, skb->len < want ? skb->len : want) || !fast_frame(skb, 0, family, outer)))
		return 0;
	/* For the verifier: of a pointer out of either case clang makes a number. */
	asm volatile("" ::: "memory");
	return 1;
}

/* A VXLAN packet that came in by the underlay's link. Into the pod, if all about it is known. The outer checksum is not looked at,
 * of which the inner one is as good a witness (RFC 6936 §3).
 */
static __always_inline int fast_unwrap(struct __sk_buff *skb, struct fast_frame *outer, int family)
{
	const __u32 room = family == FAMILY_IPV6 ? VXLAN_ROOM_IPV6 : VXLAN_ROOM;
	struct vxlan_header *vxlan;
	struct fast_frame inner;
	struct fast_flow *flow;
	struct tunnel *tunnel;
	struct row *row;
	__u32 leaves, mtu = 0;
	__u8 *end;
	__u64 now;

	if (!bring_near(skb, outer, family))
		return TCX_NEXT;
	vxlan = (void *)outer->ports;
	end = (void *)(long)skb->data_end;
	if ((__u8 *)(vxlan + 1) > end || vxlan->flags != VXLAN_FLAGS ||
	    (frame_tos(outer, family) & ECN_MASK) == ECN_CE || !fast_frame(skb, room, family, &inner) ||
	    inner.tcp_flags & TCP_TURNS || hops_left(&inner, family) <= 1 || !may_be_learned(&inner, family))
		return TCX_NEXT;
	now = bpf_ktime_get_coarse_ns();
	tunnel = find_tunnel(inner.eth->from, family, now);
	if (!tunnel || !is_through(tunnel, outer, family) || tunnel->link != skb->ifindex || tunnel->vni != vxlan->vni ||
	    !tunnel->device)
		return TCX_NEXT;
	flow = fast_find(&inner, family, tunnel->device, now);
	if (!flow || !flow->is_local)
		return TCX_NEXT;
	if (skb->gso_size)
		flow->bulk_ns = now;
	if (now - flow->bulk_ns < BULK_NS)
		return TCX_NEXT;
	leaves = flow->leaves;
	row = bpf_map_lookup_elem(&endpoints, &leaves);
	if (!row || bpf_check_mtu(skb, leaves, &mtu, -(int)room, 0) ||
	    bpf_skb_adjust_room(skb, -(int)room, BPF_ADJ_ROOM_MAC, 0))
		return TCX_NEXT;
	if (!fast_frame(skb, 0, family, &inner) || fast_judge(skb, &inner, family, &row->endpoint, flow, 0) != TCX_NEXT)
		return TCX_DROP;
	fast_rewrite(skb, &inner, flow, family);
	skb->mark = 0;
	return bpf_redirect_peer(leaves, 0);
}

static __always_inline int enter(struct __sk_buff *skb, int family)
{
	struct fast_frame frame;
	struct fast_flow *flow;
	struct tunnel *tunnel;
	__u32 leaves, mtu = 0;
	__u64 now;

	if (!fast_frame(skb, 0, family, &frame))
		return TCX_NEXT;
	if (frame.protocol == IPPROTO_UDP && is_vxlan_port(frame.ports->destination))
		return fast_unwrap(skb, &frame, family);
	if (frame.tcp_flags & TCP_TURNS) {
		if (frame.tcp_flags & (TCP_SYN | TCP_FIN))
			fast_forget(&frame, family);
		return TCX_NEXT;
	}
	if (!may_be_learned(&frame, family))
		return TCX_NEXT;
	now = bpf_ktime_get_coarse_ns();
	flow = fast_find(&frame, family, skb->ifindex, now);
	if (!flow || !may_send(skb, &frame, family, flow))
		return TCX_NEXT;
	leaves = flow->leaves;
	/* The kernel tells the sender of a packet that has come too far, or is too long for where it goes. */
	if (hops_left(&frame, family) <= 1 || bpf_check_mtu(skb, leaves, &mtu, 0, BPF_MTU_CHK_SEGS))
		return TCX_NEXT;
	if (flow->is_local) {
		struct row *row = bpf_map_lookup_elem(&endpoints, &leaves);

		if (!row)
			return TCX_NEXT;
		if (fast_judge(skb, &frame, family, &row->endpoint, flow, 1) != TCX_NEXT)
			return TCX_NEXT;
		fast_rewrite(skb, &frame, flow, family);
		/* It concerns this node alone. */
		skb->mark = 0;
		return bpf_redirect_peer(leaves, 0);
	}
	fast_rewrite(skb, &frame, flow, family);
	skb->mark = 0;
	tunnel = find_tunnel(flow->to_mac, family, now);
	if (tunnel) {
		__u32 link = tunnel->link;
		int wrapped = wrap(skb, tunnel, flow, &frame, family);

		if (wrapped < 0)
			return TCX_DROP;
		if (wrapped) {
			skb->mark = MARK_WRAPPED;
			leaves = link;
		}
	}
	return bpf_redirect(leaves, 0);
}

/* Functions of their own: each family's code lies together, and stacks are not added up. */
static __noinline int enter_ipv4(struct __sk_buff *skb)
{
	return enter(skb, FAMILY_IPV4);
}

static __noinline int enter_ipv6(struct __sk_buff *skb)
{
	return enter(skb, FAMILY_IPV6);
}

SEC("classifier")
int fast_enter(struct __sk_buff *skb)
{
	/* Its destination is still to be translated, or is judged after that. */
	if (skb->mark & MARK_DEFERRED)
		return TCX_NEXT;
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return enter_ipv6(skb);
	return enter_ipv4(skb);
}

static __always_inline int leave(struct __sk_buff *skb, int family)
{
	struct fast_flow flow = {};
	__u32 *sender, slot, ifindex = skb->ifindex;
	struct fast_frame frame;

	/* Only what has left by the VXLAN device before is its work; a pod may write the like. */
	if (skb->mark & MARK_LEFT) {
		skb->mark &= ~MARK_LEFT;
		if (!fast_frame(skb, 0, family, &frame) || frame.protocol != IPPROTO_UDP ||
		    !is_vxlan_port(frame.ports->destination))
			return TCX_NEXT;
		if (family == FAMILY_IPV6)
			learn_tunnel6(skb);
		else
			learn_tunnel(skb);
		return TCX_NEXT;
	}
	skb->mark |= MARK_LEFT;
	if (!(skb->mark & MARK_PLAIN))
		return TCX_NEXT;
	skb->mark &= ~MARK_PLAIN;
	if (!fast_frame(skb, 0, family, &frame) || frame.tcp_flags & TCP_TURNS)
		return TCX_NEXT;
	/* A connection may end as soon as it is open, and then to learn it would cost more than it brings. So what carries no data
	 * is learned once the other side's packets are.
	 */
	if (is_bare(&frame, family) && !fast_has_answer(&frame, family))
		return TCX_NEXT;
	flow.is_local = bpf_map_lookup_elem(&endpoints, &ifindex) != 0;
	/* What a pod of this node sends comes in by the bridge a second time, so its slot in the mark says where it was. */
	slot = skb->mark >> MARK_SLOT_SHIFT;
	sender = slot ? bpf_map_lookup_elem(&slots, &slot) : 0;
	flow.enters = skb->ingress_ifindex;
	if (sender) {
		flow.enters = *sender;
		flow.is_sent = 1;
	}
	flow.leaves = ifindex;
	/* Between pods of one bridge there is no hop. */
	flow.is_routed = !(sender && flow.is_local);
	if (!flow.enters)
		return TCX_NEXT;
	flow.learned_ns = bpf_ktime_get_coarse_ns();
	__builtin_memcpy(flow.to_mac, frame.eth->to, sizeof(flow.to_mac));
	__builtin_memcpy(flow.from_mac, frame.eth->from, sizeof(flow.from_mac));
	fast_remember(&frame, family, &flow);
	return TCX_NEXT;
}

SEC("classifier")
int fast_leave(struct __sk_buff *skb)
{
	/* Made by fast_enter, so there is nothing to learn from it. */
	if (skb->mark & MARK_WRAPPED) {
		skb->mark = 0;
		return TCX_NEXT;
	}
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return leave(skb, FAMILY_IPV6);
	return leave(skb, FAMILY_IPV4);
}
