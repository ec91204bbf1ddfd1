/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * The short way through the node: from the link where a packet comes in to the one where it leaves, past bridge, netfilter
 * and routing. include/fast_path.h says when it is taken.
 *
 * `fast_enter` stands before from_pod and spares it: it asks the same question itself, and remembers the answer as long as
 * the pod's policies are the same. `fast_leave` stands behind all others.
 */
#include "include/fast_tunnel.h"

/* They begin or end a connection. */
#define TCP_TURNS (TCP_SYN | TCP_FIN | TCP_RST)

static __always_inline void fast_key(const struct plain_frame *frame, struct fast_key *key)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->saddr = frame->ip->saddr;
	key->daddr = frame->ip->daddr;
	key->sport = frame->ports->source;
	key->dport = frame->ports->destination;
	key->protocol = frame->ip->protocol;
}

/* A connection begins or ends: what was known of this tuple, either way, was another's or is over. */
static __always_inline void fast_forget(const struct fast_key *key)
{
	struct fast_key answer = {
		.saddr = key->daddr,
		.daddr = key->saddr,
		.sport = key->dport,
		.dport = key->sport,
		.protocol = key->protocol,
	};

	bpf_map_delete_elem(&fast_flows, key);
	bpf_map_delete_elem(&fast_flows, &answer);
}

/* One hop less, and the checksum with it (RFC 1624): the TTL is the upper byte of its word. */
static __always_inline void fast_hop(struct ip_header *ip)
{
	__u32 sum = (__u32)bpf_ntohs(ip->checksum) + 0x0100;

	ip->checksum = bpf_htons((__u16)(sum + (sum >> 16)));
	ip->ttl--;
}

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
static __always_inline int fast_judge(struct __sk_buff *skb, const struct endpoint *endpoint, struct fast_flow *flow,
				      int known_only)
{
	struct packet packet = {};
	struct basis basis = {};
	int reason;

	if (is_valid(&flow->got, endpoint)) {
		count(INGRESS, REASON_ESTABLISHED);
		return TCX_NEXT;
	}
	reason = decide_to_pod(skb, endpoint, &packet, &basis, known_only);
	keep(&flow->got, endpoint, reason);
	if (known_only && reason != REASON_ESTABLISHED)
		return REASON_UNDECIDED;
	return act(skb, endpoint, &packet, INGRESS, reason, &basis);
}

/* Whether the sending pod may go on with the flow. If that is not certain, from_pod comes next and decides. */
static __always_inline int may_send(struct __sk_buff *skb, struct fast_flow *flow)
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
	reason = decide_from_pod(skb, endpoint, &packet, &flags, &basis, 1);
	if (reason != REASON_ESTABLISHED || flags & FLOW_DEFERRED)
		return 0;
	keep(&flow->sent, endpoint, reason);
	return 1;
}

static __always_inline struct fast_flow *fast_find(const struct fast_key *key, __u32 enters, __u64 now)
{
	struct fast_flow *flow = bpf_map_lookup_elem(&fast_flows, key);

	return flow && flow->enters == enters && now - flow->learned_ns <= FAST_VALID_NS ? flow : 0;
}

/* Writes into the frame what it has when it leaves. */
static __always_inline void fast_rewrite(struct plain_frame *frame, const struct fast_flow *flow)
{
	__builtin_memcpy(frame->eth->to, flow->to_mac, sizeof(flow->to_mac));
	__builtin_memcpy(frame->eth->from, flow->from_mac, sizeof(flow->from_mac));
	if (flow->is_routed)
		fast_hop(frame->ip);
}

/* A VXLAN packet that came in by the underlay's link. Into the pod, if all about it is known. */
static __always_inline int fast_unwrap(struct __sk_buff *skb, const struct plain_frame *outer)
{
	__u8 *start = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct vxlan_headers *vxlan = (void *)(start + sizeof(struct eth_header));
	__u64 now = bpf_ktime_get_coarse_ns();
	struct plain_frame inner;
	struct fast_flow *flow;
	struct tunnel *tunnel;
	struct fast_key key;
	struct row *row;
	__u32 leaves, mtu = 0;

	if ((__u8 *)(vxlan + 1) > end || vxlan->flags != VXLAN_FLAGS || (vxlan->ip.tos & ECN_MASK) == ECN_CE ||
	    !plain_frame(skb, VXLAN_ROOM, &inner) || inner.tcp_flags & TCP_TURNS || inner.ip->ttl <= 1)
		return TCX_NEXT;
	tunnel = find_tunnel(inner.eth->from, now);
	if (!tunnel || tunnel->daddr != outer->ip->saddr || tunnel->saddr != outer->ip->daddr ||
	    tunnel->link != skb->ifindex || tunnel->vni != vxlan->vni || !tunnel->device)
		return TCX_NEXT;
	fast_key(&inner, &key);
	flow = fast_find(&key, tunnel->device, now);
	if (!flow || !flow->is_local)
		return TCX_NEXT;
	if (skb->gso_size)
		flow->bulk_ns = now;
	if (now - flow->bulk_ns < BULK_NS)
		return TCX_NEXT;
	leaves = flow->leaves;
	row = bpf_map_lookup_elem(&endpoints, &leaves);
	if (!row || bpf_check_mtu(skb, leaves, &mtu, -(int)VXLAN_ROOM, 0) ||
	    bpf_skb_adjust_room(skb, -(int)VXLAN_ROOM, BPF_ADJ_ROOM_MAC, 0))
		return TCX_NEXT;
	if (fast_judge(skb, &row->endpoint, flow, 0) != TCX_NEXT || !plain_frame(skb, 0, &inner))
		return TCX_DROP;
	fast_rewrite(&inner, flow);
	skb->mark = 0;
	return bpf_redirect_peer(leaves, 0);
}

SEC("classifier")
int fast_enter(struct __sk_buff *skb)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	struct plain_frame frame;
	struct fast_flow *flow;
	struct tunnel *tunnel;
	struct fast_key key;
	__u32 leaves, mtu = 0;
	__u8 tos;

	/* Its destination is still to be translated, or is judged after that. */
	if (skb->mark & MARK_DEFERRED || !plain_frame(skb, 0, &frame))
		return TCX_NEXT;
	if (frame.ip->protocol == IPPROTO_UDP && is_vxlan_port(frame.ports->destination))
		return fast_unwrap(skb, &frame);
	fast_key(&frame, &key);
	if (frame.tcp_flags & TCP_TURNS) {
		fast_forget(&key);
		return TCX_NEXT;
	}
	flow = fast_find(&key, skb->ifindex, now);
	if (!flow || !may_send(skb, flow))
		return TCX_NEXT;
	leaves = flow->leaves;
	/* The kernel tells the sender of a packet that has come too far, or is too long for where it goes. */
	if (frame.ip->ttl <= 1 || bpf_check_mtu(skb, leaves, &mtu, 0, BPF_MTU_CHK_SEGS))
		return TCX_NEXT;
	if (flow->is_local) {
		struct row *row = bpf_map_lookup_elem(&endpoints, &leaves);

		if (!row)
			return TCX_NEXT;
		if (fast_judge(skb, &row->endpoint, flow, 1) != TCX_NEXT)
			return TCX_NEXT;
		fast_rewrite(&frame, flow);
		/* It concerns this node alone. */
		skb->mark = 0;
		return bpf_redirect_peer(leaves, 0);
	}
	fast_rewrite(&frame, flow);
	skb->mark = 0;
	tos = frame.ip->tos;
	tunnel = find_tunnel(flow->to_mac, now);
	if (tunnel) {
		__u32 link = tunnel->link;
		int wrapped = wrap(skb, tunnel, flow, tos);

		if (wrapped < 0)
			return TCX_DROP;
		if (wrapped) {
			skb->mark = MARK_WRAPPED;
			leaves = link;
		}
	}
	return bpf_redirect(leaves, 0);
}

SEC("classifier")
int fast_leave(struct __sk_buff *skb)
{
	struct fast_flow flow = {};
	__u32 *sender, slot, ifindex = skb->ifindex;
	struct plain_frame frame;
	struct fast_key key;

	/* Made by fast_enter, so there is nothing to learn from it. */
	if (skb->mark & MARK_WRAPPED) {
		skb->mark = 0;
		return TCX_NEXT;
	}
	/* Only what has left by the VXLAN device before is its work; a pod may write the like. */
	if (skb->mark & MARK_LEFT) {
		skb->mark &= ~MARK_LEFT;
		if (plain_frame(skb, 0, &frame) && frame.ip->protocol == IPPROTO_UDP &&
		    is_vxlan_port(frame.ports->destination))
			learn_tunnel(skb);
		return TCX_NEXT;
	}
	skb->mark |= MARK_LEFT;
	if (!(skb->mark & MARK_PLAIN))
		return TCX_NEXT;
	skb->mark &= ~MARK_PLAIN;
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
	if (!flow.enters || !plain_frame(skb, 0, &frame) || frame.tcp_flags & TCP_TURNS)
		return TCX_NEXT;
	fast_key(&frame, &key);
	flow.learned_ns = bpf_ktime_get_coarse_ns();
	__builtin_memcpy(flow.to_mac, frame.eth->to, sizeof(flow.to_mac));
	__builtin_memcpy(flow.from_mac, frame.eth->from, sizeof(flow.from_mac));
	bpf_map_update_elem(&fast_flows, &key, &flow, BPF_ANY);
	return TCX_NEXT;
}
