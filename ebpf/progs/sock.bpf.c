/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * connect() of a pod to a Service: the socket gets a backend's address at once, so that its packets need no translation
 * on the way. getpeername() still says what the program asked for.
 *
 * TCP alone. A UDP flow has no end: whoever chose its backend must take the choice back when the backend goes, which
 * conntrack lets the agent do and a connected socket does not.
 */

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
/* ::ffff:0:0/96 */
#define V4_MAPPED __builtin_bswap32(0x0000ffff)

struct bpf_sock_addr {
	__u32 user_family;
	__be32 user_ip4;
	__be32 user_ip6[4];
	__u32 user_port; /* as on the wire, in the lower half */
	__u32 family;
	__u32 type;
	__u32 protocol;
};

static __u64 (*bpf_get_socket_cookie)(void *ctx) = (void *)46;
static __u64 (*bpf_get_netns_cookie)(void *ctx) = (void *)122;

#define GO_ON 1

static __always_inline void address_v4(struct backend *out, const struct bpf_sock_addr *ctx)
{
	out->addr[2] = V4_MAPPED;
	out->addr[3] = ctx->user_ip4;
	out->port = (__be16)ctx->user_port;
}

static __always_inline void address_v6(struct backend *out, const struct bpf_sock_addr *ctx)
{
	out->addr[0] = ctx->user_ip6[0];
	out->addr[1] = ctx->user_ip6[1];
	out->addr[2] = ctx->user_ip6[2];
	out->addr[3] = ctx->user_ip6[3];
	out->port = (__be16)ctx->user_port;
}

static __always_inline int same(const struct backend *a, const struct backend *b)
{
	return a->addr[0] == b->addr[0] && a->addr[1] == b->addr[1] && a->addr[2] == b->addr[2] &&
	       a->addr[3] == b->addr[3] && a->port == b->port;
}

/* The backend for a connection to `asked`, or nothing if it is none of ours. */
static __always_inline const struct backend *choose(struct bpf_sock_addr *ctx, const struct backend *asked)
{
	struct frontend_key key = { .port = asked->port, .protocol = IPPROTO_TCP };
	struct backend_key slot = {};
	const struct frontend *frontend;
	__u64 netns;

	if (ctx->protocol != IPPROTO_TCP)
		return 0;
	netns = bpf_get_netns_cookie(ctx);
	if (!bpf_map_lookup_elem(&pod_namespaces, &netns))
		return 0;
	key.addr[0] = asked->addr[0];
	key.addr[1] = asked->addr[1];
	key.addr[2] = asked->addr[2];
	key.addr[3] = asked->addr[3];
	frontend = bpf_map_lookup_elem(&frontends, &key);
	if (!frontend || !frontend->count)
		return 0;
	slot.service = frontend->service;
	slot.slot = bpf_get_prandom_u32() % frontend->count;
	return bpf_map_lookup_elem(&backends, &slot);
}

static __always_inline void remember(struct bpf_sock_addr *ctx, const struct backend *asked, const struct backend *got)
{
	struct connected both = { .asked = *asked, .got = *got };
	__u64 cookie = bpf_get_socket_cookie(ctx);

	bpf_map_update_elem(&connected, &cookie, &both, BPF_ANY);
}

SEC("cgroup/connect4")
int sock_connect4(struct bpf_sock_addr *ctx)
{
	struct backend asked = {};
	const struct backend *got;

	address_v4(&asked, ctx);
	got = choose(ctx, &asked);
	/* A socket of this family cannot reach a backend of the other; the agent writes none. */
	if (!got || got->addr[2] != V4_MAPPED)
		return GO_ON;
	remember(ctx, &asked, got);
	ctx->user_ip4 = got->addr[3];
	ctx->user_port = got->port;
	return GO_ON;
}

SEC("cgroup/connect6")
int sock_connect6(struct bpf_sock_addr *ctx)
{
	struct backend asked = {};
	const struct backend *got;

	address_v6(&asked, ctx);
	got = choose(ctx, &asked);
	if (!got)
		return GO_ON;
	remember(ctx, &asked, got);
	ctx->user_ip6[0] = got->addr[0];
	ctx->user_ip6[1] = got->addr[1];
	ctx->user_ip6[2] = got->addr[2];
	ctx->user_ip6[3] = got->addr[3];
	ctx->user_port = got->port;
	return GO_ON;
}

/* What the socket asked for, if what it is connected to is what it got for that: it may have been connected anew. */
static __always_inline const struct backend *asked_for(struct bpf_sock_addr *ctx, const struct backend *peer)
{
	const struct connected *both;
	__u64 cookie;

	if (ctx->protocol != IPPROTO_TCP)
		return 0;
	cookie = bpf_get_socket_cookie(ctx);
	both = bpf_map_lookup_elem(&connected, &cookie);
	return both && same(&both->got, peer) ? &both->asked : 0;
}

SEC("cgroup/getpeername4")
int sock_peername4(struct bpf_sock_addr *ctx)
{
	struct backend peer = {};
	const struct backend *asked;

	address_v4(&peer, ctx);
	asked = asked_for(ctx, &peer);
	if (!asked)
		return GO_ON;
	ctx->user_ip4 = asked->addr[3];
	ctx->user_port = asked->port;
	return GO_ON;
}

SEC("cgroup/getpeername6")
int sock_peername6(struct bpf_sock_addr *ctx)
{
	struct backend peer = {};
	const struct backend *asked;

	address_v6(&peer, ctx);
	asked = asked_for(ctx, &peer);
	if (!asked)
		return GO_ON;
	ctx->user_ip6[0] = asked->addr[0];
	ctx->user_ip6[1] = asked->addr[1];
	ctx->user_ip6[2] = asked->addr[2];
	ctx->user_ip6[3] = asked->addr[3];
	ctx->user_port = asked->port;
	return GO_ON;
}
