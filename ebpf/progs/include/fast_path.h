/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * What the fast path remembers: how the node forwards the packets of a flow, learned from the kernel's own way of doing it.
 *
 * A packet goes the whole way through the kernel: bridge, conntrack, rules, routes. Behind source translation a rule of the
 * agent (table `orch-fast`) puts MARK_PLAIN on it if its connection is not translated at all. `fast_leave`, where the packet
 * leaves, then knows: a packet of this tuple that comes in by that link goes out by this one, under these MACs. conntrack
 * finds a connection by its tuple, and no two share one, so the next packet of the same tuple would fare the same; and
 * `fast_enter` sends it there at once.
 *
 * That is believed for FAST_VALID_NS. Then one packet goes the whole way again, so changed routes, neighbours and rules
 * count after that time, and conntrack and the neighbour table see that the flow lives. Beginning and end of a TCP
 * connection always go the whole way.
 *
 * The families have maps of their own, so that the keys of IPv4 stay short.
 */
#pragma once

#include "tables.h"

#define MAX_FAST_FLOWS 32768
#define MAX_FAST_TUNNELS 4096
#define FAST_VALID_NS 1000000000ULL

/* In skb->mark, set by the agent's rule: the connection has been seen by conntrack and is not translated. */
#define MARK_PLAIN 0x0200
/* Set by the programs: on a VXLAN packet that `fast_enter` made, and on what has left by a link (from_pod clears it on all that
 * comes from a pod).
 */
#define MARK_WRAPPED 0x0400
#define MARK_LEFT 0x0800

/* Padding is zeroed: it is part of the key. */
struct fast_key {
	__be32 saddr;
	__be32 daddr;
	__be16 sport;
	__be16 dport;
	__u8 protocol;
	__u8 pad[3];
};

struct fast_key6 {
	struct ip_addr saddr;
	struct ip_addr daddr;
	__be16 sport;
	__be16 dport;
	__u8 protocol;
	__u8 pad[3];
};

/* The flow was known and allowed to this endpoint in this generation of its policies. 0: not asked yet. */
struct fast_verdict {
	__u32 uid;
	__u32 generation;
};

struct fast_flow {
	__u64 learned_ns; /* CLOCK_MONOTONIC_COARSE */
	/* When a packet of many segments came last: the others wait behind such. */
	__u64 bulk_ns;
	/* Indexes of links: a pod's host end, the VXLAN device, the underlay's link. */
	__u32 enters;
	__u32 leaves;
	/* The last verdicts of the pods at both ends, if they are on this node; made anew whenever the pod has another policy. */
	struct fast_verdict sent;
	struct fast_verdict got;
	__u8 to_mac[6];
	__u8 from_mac[6];
	/* `leaves` is the host end of a pod: its policy judges the packet. */
	__u8 is_local;
	/* Not only passed on by the bridge: it has one hop less. */
	__u8 is_routed;
	/* `enters` is the host end of a pod: its policy judges the packet. */
	__u8 is_sent;
	__u8 pad;
};

/* By a hash of the tuple: when a flow of it was learned last, in either direction, in units of FAST_HINT_SHIFT bits of the kernel's
 * ticks. Where nothing was for longer than FAST_VALID_NS there is nothing to be found, so most of what belongs to no learned flow
 * (connections that begin, and end at once) needs no search. Bytes, so that all of it stays near the processor; 256 units later
 * one comes again, and then costs a search. Written by the programs, behind the flow.
 */
#define FAST_HINT_BITS 12
#define FAST_HINT_SHIFT 6

struct fast_hints {
	__u8 learned[1 << FAST_HINT_BITS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fast_hints);
} fast_hints SEC(".maps");

/* Written by the programs. Full: the oldest go; their packets go the whole way. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FAST_FLOWS);
	__type(key, struct fast_key);
	__type(value, struct fast_flow);
} fast_flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FAST_FLOWS);
	__type(key, struct fast_key6);
	__type(value, struct fast_flow);
} fast_flows6 SEC(".maps");
