/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * A frame that may take the short way, of either family: TCP or UDP right behind an IP header without options or extensions,
 * and no part of a datagram. Whatever else IPv6 has (extensions, fragments, ICMPv6 with neighbour discovery in it) is none.
 *
 * `family` is a constant wherever it stands, so each family has code of its own, and IPv4 does not pay for IPv6.
 */
#pragma once

#include "fast_path.h"
#include "verdict.h"

/* They begin or end a connection. */
#define TCP_TURNS (TCP_SYN | TCP_FIN | TCP_RST)

#define ECN_MASK 0x03
#define ECN_CE 0x03

struct udp_header {
	__be16 source;
	__be16 destination;
	__be16 length;
	__be16 checksum;
};

struct fast_frame {
	struct eth_header *eth;
	/* The one of its family. */
	struct ip_header *ip;
	struct ipv6_header *ip6;
	struct ports_header *ports;
	__u8 protocol;
	/* Of TCP: its header's length in bytes. */
	__u8 tcp_len;
	__u8 tcp_flags;
};

/* Up to the end of the shortest and of the longest headers that are read. */
#define SHORTEST_IPV6 (sizeof(struct eth_header) + sizeof(struct ipv6_header) + sizeof(struct udp_header))
#define TCP_FLAGS_AT_IPV6 (sizeof(struct eth_header) + sizeof(struct ipv6_header) + 13)
#define LONGEST_IPV6 (TCP_FLAGS_AT_IPV6 + 1)

/* The frame at `offset`; 0 if it is of another kind, or its headers are not in the buffer's first part. */
static __always_inline int fast_frame(struct __sk_buff *skb, __u32 offset, int family, struct fast_frame *frame)
{
	__u8 *start = (__u8 *)(long)skb->data + offset, *end = (void *)(long)skb->data_end;
	struct plain_frame plain;

	if (family == FAMILY_IPV4) {
		if (!plain_frame(skb, offset, &plain))
			return 0;
		frame->eth = plain.eth;
		frame->ip = plain.ip;
		frame->ports = plain.ports;
		frame->protocol = plain.ip->protocol;
		frame->tcp_len = plain.tcp_len;
		frame->tcp_flags = plain.tcp_flags;
		return 1;
	}
	if (skb->vlan_present || start + SHORTEST_IPV6 > end)
		return 0;
	frame->eth = (void *)start;
	frame->ip6 = (void *)(start + sizeof(*frame->eth));
	frame->ports = (void *)(start + sizeof(*frame->eth) + sizeof(*frame->ip6));
	frame->protocol = frame->ip6->next;
	frame->tcp_len = 0;
	frame->tcp_flags = 0;
	if (frame->eth->type != bpf_htons(ETH_P_IPV6) || (*(__u8 *)frame->ip6 & 0xf0) != 0x60)
		return 0;
	if (frame->protocol == IPPROTO_UDP)
		return 1;
	if (frame->protocol != IPPROTO_TCP || start + LONGEST_IPV6 > end)
		return 0;
	frame->tcp_len = start[TCP_FLAGS_AT_IPV6 - 1] >> 4 << 2;
	frame->tcp_flags = start[TCP_FLAGS_AT_IPV6];
	return 1;
}

/* What a verdict needs of it. */
static __always_inline void fast_packet(const struct fast_frame *frame, int family, struct packet *packet)
{
	packet->family = family;
	if (family == FAMILY_IPV6) {
		packet->saddr = frame->ip6->saddr;
		packet->daddr = frame->ip6->daddr;
	} else {
		packet->saddr.words[0] = frame->ip->saddr;
		packet->daddr.words[0] = frame->ip->daddr;
	}
	packet->sport = frame->ports->source;
	packet->dport = frame->ports->destination;
	packet->protocol = frame->protocol;
	packet->tcp_flags = frame->tcp_flags;
}

/* How many hops it may still take. */
static __always_inline __u8 hops_left(const struct fast_frame *frame, int family)
{
	return family == FAMILY_IPV6 ? frame->ip6->hop_limit : frame->ip->ttl;
}

/* TCP that carries no data. */
static __always_inline int is_bare(const struct fast_frame *frame, int family)
{
	__u16 len = family == FAMILY_IPV6 ? bpf_ntohs(frame->ip6->payload_len) :
					    bpf_ntohs(frame->ip->total_len) - (__u16)sizeof(*frame->ip);

	return frame->protocol == IPPROTO_TCP && len == frame->tcp_len;
}

/* Type of service, or traffic class. */
static __always_inline __u8 frame_tos(const struct fast_frame *frame, int family)
{
	return family == FAMILY_IPV6 ? bpf_ntohl(frame->ip6->version_flow) >> 20 : frame->ip->tos;
}

/* One hop less. A checksum that the link has made of the whole packet follows: in IPv4 it is as it was, as the header's own
 * (RFC 1624; the TTL is the upper byte of its word) takes up the difference.
 */
static __always_inline void take_hop(struct __sk_buff *skb, struct fast_frame *frame, int family)
{
	__u32 sum;

	if (family == FAMILY_IPV6) {
		frame->ip6->hop_limit--;
		bpf_csum_update(skb, ~(__u32)bpf_htons(1));
		return;
	}
	sum = (__u32)bpf_ntohs(frame->ip->checksum) + 0x0100;
	frame->ip->checksum = bpf_htons((__u16)(sum + (sum >> 16)));
	frame->ip->ttl--;
}

/* Writes into the frame what it has when it leaves. */
static __always_inline void fast_rewrite(struct __sk_buff *skb, struct fast_frame *frame, const struct fast_flow *flow,
					 int family)
{
	__builtin_memcpy(frame->eth->to, flow->to_mac, sizeof(flow->to_mac));
	__builtin_memcpy(frame->eth->from, flow->from_mac, sizeof(flow->from_mac));
	if (flow->is_routed)
		take_hop(skb, frame, family);
}

static __always_inline void fast_key(const struct fast_frame *frame, struct fast_key *key)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->saddr = frame->ip->saddr;
	key->daddr = frame->ip->daddr;
	key->sport = frame->ports->source;
	key->dport = frame->ports->destination;
	key->protocol = frame->protocol;
}

static __always_inline void fast_key6(const struct fast_frame *frame, struct fast_key6 *key)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->saddr = frame->ip6->saddr;
	key->daddr = frame->ip6->daddr;
	key->sport = frame->ports->source;
	key->dport = frame->ports->destination;
	key->protocol = frame->protocol;
}

/* Where something is said of the frame's flow; both directions have the same place. */
static __always_inline __u8 *fast_hint(const struct fast_frame *frame, int family)
{
	__u32 place = (__u32)(frame->ports->source ^ frame->ports->destination), zero = 0;
	struct fast_hints *hints = bpf_map_lookup_elem(&fast_hints, &zero);

	if (family == FAMILY_IPV6) {
#pragma unroll
		for (int i = 0; i < 4; i++)
			place ^= frame->ip6->saddr.words[i] ^ frame->ip6->daddr.words[i];
	} else {
		place ^= frame->ip->saddr ^ frame->ip->daddr;
	}
	return hints ? &hints->learned[place * 0x9e3779b1 >> (32 - FAST_HINT_BITS)] : 0;
}

static __always_inline __u8 fast_unit(void)
{
	return bpf_jiffies64() >> FAST_HINT_SHIFT;
}

/* 0: neither direction of the frame's flow is known. */
static __always_inline int may_be_learned(const struct fast_frame *frame, int family)
{
	const __u8 *hint = fast_hint(frame, family);
	__u8 age;

	if (!hint)
		return 0;
	age = fast_unit() - *hint;
	/* One more: neither of the two times is whole. */
	return age <= (ticks_per_second >> FAST_HINT_SHIFT) + 1;
}

/* What is known of the frame's flow, if it came in by that link. */
static __always_inline struct fast_flow *fast_find(const struct fast_frame *frame, int family, __u32 enters, __u64 now)
{
	struct fast_flow *flow;

	if (family == FAMILY_IPV6) {
		struct fast_key6 key;

		fast_key6(frame, &key);
		flow = bpf_map_lookup_elem(&fast_flows6, &key);
	} else {
		struct fast_key key;

		fast_key(frame, &key);
		flow = bpf_map_lookup_elem(&fast_flows, &key);
	}
	return flow && flow->enters == enters && now - flow->learned_ns <= FAST_VALID_NS ? flow : 0;
}

static __always_inline void fast_remember(const struct fast_frame *frame, int family, const struct fast_flow *flow)
{
	__u8 *hint = fast_hint(frame, family);

	if (!hint)
		return;
	if (family == FAMILY_IPV6) {
		struct fast_key6 key;

		fast_key6(frame, &key);
		bpf_map_update_elem(&fast_flows6, &key, flow, BPF_ANY);
	} else {
		struct fast_key key;

		fast_key(frame, &key);
		bpf_map_update_elem(&fast_flows, &key, flow, BPF_ANY);
	}
	*hint = fast_unit();
}

/* Keys of what goes the other way. */
static __always_inline void fast_answer(const struct fast_frame *frame, struct fast_key *key)
{
	fast_key(frame, key);
	key->saddr = frame->ip->daddr;
	key->daddr = frame->ip->saddr;
	key->sport = frame->ports->destination;
	key->dport = frame->ports->source;
}

static __always_inline void fast_answer6(const struct fast_frame *frame, struct fast_key6 *key)
{
	fast_key6(frame, key);
	key->saddr = frame->ip6->daddr;
	key->daddr = frame->ip6->saddr;
	key->sport = frame->ports->destination;
	key->dport = frame->ports->source;
}

/* Whether the other direction of the frame's flow is known. */
static __always_inline int fast_has_answer(const struct fast_frame *frame, int family)
{
	if (!may_be_learned(frame, family))
		return 0;
	if (family == FAMILY_IPV6) {
		struct fast_key6 answer;

		fast_answer6(frame, &answer);
		return bpf_map_lookup_elem(&fast_flows6, &answer) != 0;
	} else {
		struct fast_key answer;

		fast_answer(frame, &answer);
		return bpf_map_lookup_elem(&fast_flows, &answer) != 0;
	}
}

/* One side begins or ends a connection: what was known of this direction was another's, or is over. With an end the other one is
 * forgotten too: its last packet carries nothing but the answer to this one, which conntrack is to see. Mostly nothing was known,
 * and to look is cheaper than to delete.
 */
static __always_inline void fast_forget(const struct fast_frame *frame, int family)
{
	int is_end = frame->tcp_flags & TCP_FIN;

	if (!may_be_learned(frame, family))
		return;
	if (family == FAMILY_IPV6) {
		struct fast_key6 key;

		fast_key6(frame, &key);
		if (bpf_map_lookup_elem(&fast_flows6, &key))
			bpf_map_delete_elem(&fast_flows6, &key);
		fast_answer6(frame, &key);
		if (is_end && bpf_map_lookup_elem(&fast_flows6, &key))
			bpf_map_delete_elem(&fast_flows6, &key);
	} else {
		struct fast_key key;

		fast_key(frame, &key);
		if (bpf_map_lookup_elem(&fast_flows, &key))
			bpf_map_delete_elem(&fast_flows, &key);
		fast_answer(frame, &key);
		if (is_end && bpf_map_lookup_elem(&fast_flows, &key))
			bpf_map_delete_elem(&fast_flows, &key);
	}
}
