/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * What the tables said last, by who asked and about whom: a place for each, found by number, so that a pod that goes on opening
 * connections to the same peers costs no search in its tables. An answer holds as long as the row is the same: its revision grows
 * whenever it names other tables, and what a table says never changes.
 */
#pragma once

#include "tables.h"

#define JUDGED_BITS 9
#define MAX_JUDGED (1 << JUDGED_BITS)

/* What a verdict rests on. */
struct basis {
	__u32 rule;
	__u32 peer_class;
};

/* Padding is zeroed: it is compared. */
struct question {
	struct ip_addr remote;
	__u64 revision;
	__u32 uid;
	__u32 generation;
	/* The policy's. */
	__be16 port;
	__u8 protocol;
	__u8 direction;
	__u8 family;
	__u8 pad[3];
};

struct judged {
	struct question question;
	struct basis basis;
	/* 0: nobody has asked. */
	__u64 reason;
};

/* Written by the programs, and theirs alone, as `fresh_flows`. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_JUDGED);
	__type(key, __u32);
	__type(value, struct judged);
} judged SEC(".maps");

static __always_inline struct judged *judged_place(const struct question *question)
{
	__u32 place = question->uid ^ question->remote.words[0] ^ question->remote.words[3];

	place ^= (__u32)question->port << 16 ^ question->direction;
	place = place * 0x9e3779b1 >> (32 - JUDGED_BITS);
	return bpf_map_lookup_elem(&judged, &place);
}

_Static_assert(sizeof(struct question) % sizeof(__u32) == 0, "questions are compared in words");

static __always_inline int is_same_question(const struct question *one, const struct question *other)
{
	return is_same(one, other, sizeof(*one));
}
