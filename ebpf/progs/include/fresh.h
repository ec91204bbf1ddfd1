/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * Flows of which a packet passed in this unit of the clock of legs, on this CPU, and those that were opened in it: a
 * place for each, found by number, so that most packets of a known flow need no search in `flows`. What is here is true as long
 * as the row's generation is the same; the first packet of every unit asks `flows` again, which so sees who lives.
 */
#pragma once

#include "tables.h"

#define FRESH_BITS 10
#define MAX_FRESH (1 << FRESH_BITS)

struct fresh {
	struct flow_key key;
	__u32 generation;
	__u32 unit;
	/* Of the packet: if both sides opened the flow, each direction is an answer to another one. */
	__u32 direction;
};

/* Written by the programs, and theirs alone: new ones begin with an empty one. Flows that share a place have it by turns. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_FRESH);
	__type(key, __u32);
	__type(value, struct fresh);
} fresh_flows SEC(".maps");

static __always_inline struct fresh *fresh_place(const struct flow_key *key, __u8 direction)
{
	__u32 place = key->uid ^ key->remote.words[0] ^ key->remote.words[3] ^ direction;

	place ^= (__u32)key->local_port << 16 | key->remote_port;
	place = place * 0x9e3779b1 >> (32 - FRESH_BITS);
	return bpf_map_lookup_elem(&fresh_flows, &place);
}

static __always_inline void freshen(struct fresh *fresh, const struct flow_key *key, __u8 direction, __u32 generation,
				    __u32 unit)
{
	fresh->key = *key;
	fresh->generation = generation;
	fresh->unit = unit;
	fresh->direction = direction;
}

static __always_inline int is_same_flow(const struct flow_key *a, const struct flow_key *b)
{
	return is_same(a, b, sizeof(*a));
}

static __always_inline int is_fresh(const struct fresh *fresh, const struct flow_key *key, __u8 direction, __u32 generation,
				    __u32 unit)
{
	return fresh->unit == unit && fresh->generation == generation && fresh->direction == direction &&
	       is_same_flow(&fresh->key, key);
}
