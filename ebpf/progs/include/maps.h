/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * What the programs, the agent and the `policy` plugin share: the structs and the maps. ebpf/maps has the Rust twins;
 * a test compares the two through BTF. A change here that is not only an addition of maps needs a new LAYOUT_VERSION,
 * which is part of the pin folder's name.
 *
 * How a verdict is made. Every pod has an `endpoint` row. The row names a class map (address -> peer class) and a rule
 * table (class, direction, protocol, port -> action). Both are built aside by the agent and never changed once a row
 * names them, except that addresses are added; so one write of the row switches an endpoint from one whole policy to
 * the next. The row's generation goes into every conntrack entry: an entry of another generation is judged again.
 */
#pragma once

#include "bpf.h"

#define LAYOUT_VERSION 4

#define MAX_ENDPOINTS 4096
/* Inner maps have the numbers below these; a row that needs none names 0, which none has. */
#define MAX_TABLES 8192
#define MAX_CLASS_MAPS 64
#define MAX_CLASS_ENTRIES 262144
#define MAX_RULE_ENTRIES 262144
#define MAX_ADDRESSES 65536
/* About 8 MiB, which the kernel takes at once: LRU maps are allocated whole. Both ends of a connection count. */
#define MAX_FLOWS 65536
#define MAX_FRAGMENTS 8192

/* Index in `event_losses`: why an event was not told. */
enum event_loss {
	LOSS_BUDGET = 0,
	LOSS_RING_FULL = 1,
	LOSS_COUNT = 2,
};

/* A direction as NetworkPolicy says it: seen from the pod. */
enum direction {
	INGRESS = 0,
	EGRESS = 1,
};

/* Families of addresses: part of every key that has one, so that no address of one is taken for the other's. */
#define FAMILY_IPV4 4
#define FAMILY_IPV6 6

/* An address of either family: IPv4 is the first word, and the others are 0. */
struct ip_addr {
	__be32 words[4];
};

/* What an endpoint is allowed to do at all. There is no state "open without policy". */
enum endpoint_state {
	/* Made by the plugin; nobody has said what applies. Only its own node reaches it. */
	ENDPOINT_PENDING = 1,
	/* The agent has said what applies. */
	ENDPOINT_READY = 2,
	/* Its policy cannot be put into maps (too big, map full). As PENDING, but said aloud. */
	ENDPOINT_LOCKED = 3,
};

/* endpoint.flags: without the flag everything is allowed in that direction and no table is asked. */
#define ISOLATED_INGRESS 0x01
#define ISOLATED_EGRESS 0x02

/* One pod. The plugin inserts it PENDING, the agent replaces it whole. */
struct endpoint {
	/* Made up by the plugin, new for every attachment: flows of an earlier pod in this slot are not this one's. */
	__u32 uid;
	/* 1..65535: stands for the endpoint in packet marks; key in `slots`. */
	__u32 slot;
	/* Grows with every change of what applies. */
	__u32 generation;
	/* Number in `class_maps`. */
	__u32 class_map;
	/* Number in `tables`. */
	__u32 table;
	/* IPv4 address of the pod; 0 if it has none. */
	__be32 addr;
	/* MAC of the pod's end. */
	__u8 mac[6];
	__u8 state;
	__u8 flags;
	/* Of the policies that are in force: what the agent last compiled. Another one with every change of the row. */
	__u64 revision;
	/* IPv6 address of the pod; 0 if it has none. Its link-local address follows from the MAC. */
	struct ip_addr addr6;
};

/* Value of `endpoints`; the key is the index of the host end of the pod's veth.
 *
 * The kernel gives the memory of a replaced row to the next one that is written, while a program may still look at it; a row
 * in `endpoint_cache` is written over where it lies. So a program takes a copy, and the copy counts if it is whole: `link` is
 * the key again, and `check` the sum that ROW_WEIGHTS make of all words before it. A mixture of two rows has another sum but
 * for one chance in 2^64.
 */
struct row {
	struct endpoint endpoint;
	__u32 link;
	__u32 pad;
	__u64 check;
};

/* Odd, so that no single word can differ without the sum. */
#define ROW_WEIGHTS                                                                                                     \
	{ 0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb, 0xd6e8feb86659fd93,                               \
	  0xa0761d6478bd642f, 0xe7037ed1a0b428db, 0x8ebc6af09c88c6e3, 0x589965cc75374cc3 }

/* Bits of a key of a class map before the address. */
#define FAMILY_BITS 32

/* Key of a class map: LPM over the family, which is always whole, and an address of it. The value is the peer class, a
 * __u32.
 */
struct class_key {
	__u32 prefix_len; /* FAMILY_BITS + 0..32 or 0..128 */
	__u32 family;
	struct ip_addr addr;
};

/* An address that has no entry in the class map: anything outside of what policies and pods mention. */
#define CLASS_NONE 0

/* Key of a rule table: LPM. The first 40 bits (class and direction) are always given, so prefix_len is
 * 40 (any protocol), 48 (any port) or 49..64 (a prefix of ports). A class either has no entry at all in a direction, and
 * then CLASS_NONE is asked, or all its answers are its own: the compiler then writes a /40 entry for it. Nothing found
 * means denied. The longest prefix decides.
 */
struct rule_key {
	__u32 prefix_len;
	__u32 peer_class;
	__u8 direction;
	__u8 protocol;
	__be16 port; /* destination port; 0 for what has none */
};

enum rule_action {
	RULE_DENY = 0,
	RULE_ALLOW = 1,
};

struct rule {
	/* Which policy and rule decided, as the agent numbers them. */
	__u32 id;
	__u8 action;
	__u8 pad[3];
};

/* What an address is to this node, independent of any policy. LPM; keys as in a class map. */
#define ADDRESS_NODE 0x01	 /* this node's own: always reachable from and to its pods */
#define ADDRESS_SERVICE 0x02	 /* gets translated: judged after that */
#define ADDRESS_REMOTE_NODE 0x04 /* no pod talks VXLAN to it */

struct address {
	__u32 flags;
};

/* A flow as one endpoint sees it: one key for its packets in both directions. Which endpoint it is says also which address
 * is its own.
 */
struct flow_key {
	__u32 uid;
	struct ip_addr remote;
	__be16 local_port;
	__be16 remote_port;
	__u8 protocol;
	__u8 family;
	/* enum local_kind */
	__u8 local;
	__u8 pad;
};

/* An endpoint's own address in a flow. */
enum local_kind {
	/* endpoint.addr or endpoint.addr6. */
	LOCAL_ASSIGNED = 0,
	/* The IPv6 address that follows from its MAC. */
	LOCAL_LINK = 1,
	/* None yet. */
	LOCAL_NONE = 2,
};

/* leg.flags: the destination gets translated; the packets are judged again after that. */
#define FLOW_DEFERRED 0x01
/* A TCP connection whose beginning was not seen: allowed as long as both sides may open it. */
#define FLOW_EITHER 0x02

/* Clock of legs: the kernel's ticks, in units of so many bits of them; a second, more or less. */
#define LEG_CLOCK_SHIFT 8

/* What is known of a flow that was opened in one direction. */
struct leg {
	/* By the clock of legs; 0 if the agent has told of the flow and no packet has come since. Written once in a unit:
	 * packets of both directions share the memory, maybe between CPUs.
	 */
	__u32 last;
	__u32 generation;
	__u8 tcp_flags; /* all that were seen */
	__u8 flags;
	/* 0: nobody has opened it in this direction. */
	__u8 is_open;
	__u8 pad;
};

/* By the direction in which it was opened. Both sides may open the same flow. */
struct flow {
	struct leg legs[2];
};

/* IPv6 identifies a datagram without its protocol (RFC 8200 §4.5): it is 0 there. */
struct fragment_key {
	__u32 uid;
	struct ip_addr saddr;
	struct ip_addr daddr;
	__be32 id;
	__u8 protocol;
	__u8 direction;
	__u8 family;
	__u8 pad;
};

/* What the first part of a datagram said. */
struct fragment {
	__be16 sport;
	__be16 dport;
	__u8 protocol;
	__u8 pad[3];
};

/* Told to user space: a flow was dropped, or opened. */
struct event {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u32 uid;
	__u32 ifindex;
	struct ip_addr saddr;
	struct ip_addr daddr;
	__be16 sport;
	__be16 dport;
	__u8 protocol;
	__u8 direction;
	__u8 reason;
	__u8 family;
	__u32 rule;
	__u32 peer_class;
};

/* skb->mark between the hooks of one packet: the sender's slot in the upper half, and whether somebody still has to judge.
 * kube-proxy has 0x4000 and 0x8000, portmap 0x2000.
 */
#define MARK_SLOT_SHIFT 16
#define MARK_SLOT_MASK 0xffff0000
#define MARK_DEFERRED 0x0100

/* The agent's settings. One element. */
struct config {
	__u32 version; /* LAYOUT_VERSION, once the agent has filled everything */
	__be16 vxlan_port;
	/* Programs of a build with another layout are behind ours, and know the pods that we do not yet. */
	__u8 has_former;
	__u8 pad;
};
