/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * What the socket programs and the agent share: the structs and the maps. ebpf/maps has the Rust twins; a test compares
 * the two. A change needs a new SERVICES_VERSION, which is part of the pin folder's name.
 *
 * A Service's backends are written under a new number before its frontends name that number, and removed after no
 * frontend does. So a reader sees one whole set of backends, or finds nothing and leaves the connection as it is: then
 * nftables translates its packets, as it does for all that is not in here.
 */
#pragma once

#include "bpf.h"

#define SERVICES_VERSION 2

#define MAX_FRONTENDS 65536
#define MAX_BACKENDS 262144
#define MAX_POD_NAMESPACES 4096
#define MAX_CONNECTED 65536
#define MAX_CHOSEN 16384
#define MAX_CLIENTS 16384

/* IPv4 is ::ffff:a.b.c.d, as sockets of both families have it. */
struct frontend_key {
	__be32 addr[4];
	__be16 port;
	__u8 protocol;
	__u8 pad;
};

struct frontend {
	__u32 service; /* first half of the backends' keys */
	__u32 count;   /* never 0 */
	__u32 affinity_secs; /* how long a client's backend is remembered; 0: not at all */
};

struct backend_key {
	__u32 service;
	__u32 slot;
};

struct backend {
	__be32 addr[4];
	__be16 port;
	__u8 pad[2];
};

/* That a frontend has a backend. Whatever is chosen is asked about here: what was chosen before may be gone, and a row that is
 * read may become another's meanwhile, so that what was read is a mixture.
 */
struct member {
	struct frontend_key to;
	struct backend backend;
};

/* What a socket asked for, and what it got instead. */
struct connected {
	struct backend asked;
	struct backend got;
};

/* A socket that is not connected, and one of those that it talks to. */
struct talk {
	__u64 cookie;
	struct backend peer;
	__u32 pad;
};

/* A pod (all its sockets) and a frontend with affinity. */
struct client_key {
	__u64 netns;
	struct frontend_key to;
	__u32 pad;
};

struct client {
	__u64 last; /* connection, in ns since boot */
	struct backend backend;
	__u32 pad;
};

/* Written by the agent. Full: the Service stays with nftables. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_FRONTENDS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct frontend_key);
	__type(value, struct frontend);
} frontends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_BACKENDS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct backend_key);
	__type(value, struct backend);
} backends SEC(".maps");

/* Written by the agent. Full: as `frontends`. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_BACKENDS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct member);
	__type(value, __u32);
} members SEC(".maps");

/* Cookies of the network namespaces of this node's pods. Written by the agent; who is not in here is left alone: the
 * programs are attached to the machine's whole cgroup tree, where other nodes (lab) and host processes live.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_POD_NAMESPACES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u32);
} pod_namespaces SEC(".maps");

/* By socket cookie. Written by the programs. Full: the oldest socket sees its backend's address in getpeername(). */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_CONNECTED);
	__type(key, __u64);
	__type(value, struct connected);
} connected SEC(".maps");

/* By socket and Service, the backend of a UDP socket that is not connected. Written by the programs. Full: the socket that was
 * silent longest gets another backend, as it would where conntrack forgot it.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_CHOSEN);
	__type(key, struct talk);
	__type(value, struct backend);
} chosen SEC(".maps");

/* By socket and backend, the Service whose answers come from there. Written by the programs. Full: an answer has its sender's
 * address until the socket sends again.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_CHOSEN);
	__type(key, struct talk);
	__type(value, struct backend);
} answers SEC(".maps");

/* Which backend a pod had last. Written by the programs. Full: the pod that connected least recently gets another one. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_CLIENTS);
	__type(key, struct client_key);
	__type(value, struct client);
} clients SEC(".maps");
