/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * Why a packet passed or was dropped: at once the verdict, the counter's index and the name that people are told.
 * The Rust twin is ebpf/maps/src/reason.rs; a test compares the two through BTF.
 */
#pragma once

enum reason {
	REASON_ESTABLISHED = 0,
	REASON_ALLOWED = 1,
	REASON_NOT_ISOLATED = 2,
	REASON_NODE = 3,
	REASON_DEFERRED = 4,
	REASON_RELATED = 5,
	REASON_NEIGHBOUR = 6,
	REASON_ARP = 7,
	REASON_HAIRPIN = 8,

	/* From here on: dropped. */
	REASON_POLICY = 16,
	REASON_REVOKED = 17,
	REASON_PENDING = 18,
	REASON_LOCKED = 19,
	REASON_NO_ENDPOINT = 20,
	REASON_SPOOF = 21,
	REASON_NOT_MINE = 22,
	REASON_OTHER_PROTOCOL = 23,
	REASON_MALFORMED = 24,
	REASON_FRAGMENT_MISS = 25,
	REASON_FLOW_TABLE_FULL = 26,
	REASON_ENCAPSULATION = 27,
	REASON_NO_TABLE = 28,
	REASON_EXTENSION = 29,
	REASON_STRAY = 30,

	REASON_COUNT = 32,
};

#define FIRST_DROP REASON_POLICY
