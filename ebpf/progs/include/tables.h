/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * The maps. Full never means open: what cannot be stored is dropped (flows) or leaves the endpoint as it was (the
 * agent's tables).
 */
#pragma once

#include "maps.h"
#include "reasons.h"

/* ifindex -> endpoint. Written by the plugin (PENDING) and the agent. Full: the plugin fails ADD. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_ENDPOINTS);
	__type(key, __u32);
	__type(value, struct row);
} endpoints SEC(".maps");

/* ifindex % MAX_ENDPOINTS -> its row as `endpoints` has it, or nothing: found without a search. Written by who writes a row,
 * in this order: nothing here, the row there, the row here. So it is never older than what is there, also if the writer is
 * killed. Links that share a place have it by turns.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_ENDPOINTS);
	__type(key, __u32);
	__type(value, struct row);
} endpoint_cache SEC(".maps");

/* slot -> ifindex. Written by the plugin. Full: the plugin fails ADD. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_ENDPOINTS);
	__type(key, __u32);
	__type(value, __u32);
} slots SEC(".maps");

/* Clang 14 emits no BTF for a struct that only an inner map's key names, so inner maps give sizes. */
struct class_map {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, MAX_CLASS_ENTRIES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(key_size, sizeof(struct class_key));
	__uint(value_size, sizeof(__u32));
};

struct rule_table {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, MAX_RULE_ENTRIES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(key_size, sizeof(struct rule_key));
	__uint(value_size, sizeof(struct rule));
};

/* Which class an address has: one inner map per state of the cluster. Written by the agent. Full: endpoints stay.
 *
 * A number is given again only after its inner map was taken out, and the kernel lets the agent go on from that when no
 * program runs any more that could have read a row with the number's former meaning. The same goes for `tables`.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_CLASS_MAPS);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
	__array(values, struct class_map);
} class_maps SEC(".maps");

/* What policies say: one inner map per distinct set of rules. Written by the agent. Full: endpoints are LOCKED. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_TABLES);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
	__array(values, struct rule_table);
} tables SEC(".maps");

/* Written by the agent, and by the plugin for its gateway. Full: an address is not known as the node's. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, MAX_ADDRESSES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct class_key);
	__type(value, struct address);
} addresses SEC(".maps");

/* Written by the programs. Full: the oldest go; their flows are judged again. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct flow_key);
	__type(value, struct flow);
} flows SEC(".maps");

/* Ports of fragmented datagrams. Written by the programs. Full: the oldest go; their later fragments are dropped. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FRAGMENTS);
	__type(key, struct fragment_key);
	__type(value, struct fragment);
} fragments SEC(".maps");

/* direction * REASON_COUNT + reason -> packets. Written by the programs, read by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2 * REASON_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* Drops and new flows, for people. Written by the programs, read by the agent. Full: events are lost, packets not. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

/* Events of the current unit of the clock of legs, so that a flood of drops costs little. Written by the programs. */
struct event_budget {
	__u64 unit;
	__u64 spent;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct event_budget);
} event_budgets SEC(".maps");

/* Events that nobody hears of, by cause. Written by the programs, read by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, LOSS_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} event_losses SEC(".maps");

/* endpoint.uid -> 1: packets came from the middle of connections that are not known. Written by the programs; the agent
 * looks into the pod's sockets, tells them what is open, and removes the row. Full: those endpoints wait for the others.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_ENDPOINTS);
	__type(key, __u32);
	__type(value, __u32);
} strays SEC(".maps");

/* Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct config);
} settings SEC(".maps");

static __always_inline int is_whole(const struct row *row, __u32 link)
{
	const __u64 weights[] = ROW_WEIGHTS;
	const __u64 *words = (const __u64 *)row;
	__u64 sum = 0;

	_Static_assert(__builtin_offsetof(struct row, check) == sizeof(weights), "rows are summed in words");
#pragma unroll
	for (unsigned int i = 0; i < sizeof(weights) / sizeof(*weights); i++)
		sum += words[i] * weights[i];
	return sum == row->check && row->link == link;
}

/* Of two structs without unnamed padding; `size` is a constant, in whole words. There is no memcmp to call. */
static __always_inline int is_same(const void *one, const void *other, unsigned int size)
{
	const __u32 *left = one, *right = other;
	__u32 differs = 0;

#pragma unroll
	for (unsigned int i = 0; i < size / sizeof(*left); i++)
		differs |= left[i] ^ right[i];
	return !differs;
}

_Static_assert(sizeof(struct flow_key) % sizeof(__u32) == 0, "keys of flows are compared in words");

/* How often a row that is being replaced is read again. */
#define ROW_ATTEMPTS 8

/* A search that has come to memory of a replaced row may also miss a row that is there, so it is begun again. Seldom run, so not
 * worth the room that copies of it would take.
 */
static __noinline int search_endpoint(__u32 ifindex, struct row *row)
{
	struct row *found;

#pragma clang loop unroll(disable)
	for (int i = 0; i < ROW_ATTEMPTS; i++) {
		found = bpf_map_lookup_elem(&endpoints, &ifindex);
		if (!found)
			continue;
		*row = *found;
		if (is_whole(row, ifindex))
			return 1;
	}
	return 0;
}

/* A copy of the row of a link, whole; 0 if there is none. */
static __always_inline int read_endpoint(__u32 ifindex, struct row *row)
{
	__u32 place = ifindex % MAX_ENDPOINTS;
	struct row *found = bpf_map_lookup_elem(&endpoint_cache, &place);

	if (found) {
		*row = *found;
		if (is_whole(row, ifindex))
			return 1;
	}
	return search_endpoint(ifindex, row);
}
