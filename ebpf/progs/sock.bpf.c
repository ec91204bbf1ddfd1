/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * A pod's socket that turns to a Service gets a backend's address at once, so that its packets need no translation on the
 * way, and still hears of the Service alone: from getpeername(), and as the source of what comes back.
 *
 * TCP chooses at connect(). UDP chooses at the first datagram of a socket that is not connected, and again when the backend
 * is none any more. Connected UDP sockets stay with nftables: their datagrams are not asked about, so a backend that goes
 * would have to be taken from them by closing them, while conntrack moves such a flow and the socket notices nothing.
 */

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define TCP_ESTABLISHED 1
#define NS_PER_SEC 1000000000ULL
/* ::ffff:0:0/96 */
#define V4_MAPPED __builtin_bswap32(0x0000ffff)

struct bpf_sock {
	__u32 bound_dev_if;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 mark;
	__u32 priority;
	__u32 src_ip4;
	__u32 src_ip6[4];
	__u32 src_port;
	__be16 dst_port;
	__u16 pad;
	__u32 dst_ip4;
	__u32 dst_ip6[4];
	__u32 state;
};

struct bpf_sock_addr {
	__u32 user_family;
	__be32 user_ip4;
	__be32 user_ip6[4];
	__u32 user_port; /* as on the wire, in the lower half */
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 msg_src_ip4;
	__u32 msg_src_ip6[4];
	struct bpf_sock *sk __attribute__((aligned(8)));
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

static __always_inline void put_v4(struct bpf_sock_addr *ctx, const struct backend *to)
{
	ctx->user_ip4 = to->addr[3];
	ctx->user_port = to->port;
}

static __always_inline void put_v6(struct bpf_sock_addr *ctx, const struct backend *to)
{
	ctx->user_ip6[0] = to->addr[0];
	ctx->user_ip6[1] = to->addr[1];
	ctx->user_ip6[2] = to->addr[2];
	ctx->user_ip6[3] = to->addr[3];
	ctx->user_port = to->port;
}

static __always_inline int same(const struct backend *a, const struct backend *b)
{
	return a->addr[0] == b->addr[0] && a->addr[1] == b->addr[1] && a->addr[2] == b->addr[2] &&
	       a->addr[3] == b->addr[3] && a->port == b->port;
}

/* Whether the socket is a pod's of this node; says whose. */
static __always_inline int is_pod(struct bpf_sock_addr *ctx, __u64 *netns)
{
	*netns = bpf_get_netns_cookie(ctx);
	return bpf_map_lookup_elem(&pod_namespaces, netns) != 0;
}

static __always_inline void frontend_key(struct frontend_key *out, const struct backend *asked, __u8 protocol)
{
	out->addr[0] = asked->addr[0];
	out->addr[1] = asked->addr[1];
	out->addr[2] = asked->addr[2];
	out->addr[3] = asked->addr[3];
	out->port = asked->port;
	out->protocol = protocol;
}

static __always_inline int is_member(const struct frontend_key *to, const struct backend *backend)
{
	struct member key = { .to = *to, .backend = *backend };

	return bpf_map_lookup_elem(&members, &key) != 0;
}

/* One by chance. None: they are being replaced just now. */
static __always_inline int draw(const struct frontend *frontend, const struct frontend_key *to, struct backend *got)
{
	struct backend_key slot = { .service = frontend->service };
	const struct backend *drawn;
	__u32 count = frontend->count;

	if (!count)
		return 0;
	slot.slot = bpf_get_prandom_u32() % count;
	drawn = bpf_map_lookup_elem(&backends, &slot);
	if (!drawn)
		return 0;
	*got = *drawn;
	return is_member(to, got);
}

/* The backend that the pod had last, if that was not too long ago. */
static __always_inline int bring_back(const struct frontend *frontend, __u64 netns, const struct frontend_key *to,
				      struct backend *got)
{
	struct client_key key = { .netns = netns, .to = *to };
	struct client next = { .last = bpf_ktime_get_ns() };
	struct client *known = bpf_map_lookup_elem(&clients, &key);

	if (known && next.last - known->last < frontend->affinity_secs * NS_PER_SEC) {
		*got = known->backend;
		if (is_member(to, got)) {
			known->last = next.last;
			return 1;
		}
	}
	if (!draw(frontend, to, got))
		return 0;
	next.backend = *got;
	bpf_map_update_elem(&clients, &key, &next, BPF_ANY);
	return 1;
}

/* The socket is on its way to this address itself: what comes from there is no Service's answer. */
static __always_inline void forget_answers(const struct talk *to)
{
	if (bpf_map_lookup_elem(&answers, to))
		bpf_map_delete_elem(&answers, to);
}

/* connect(): whether there is a backend for a connection to `asked`. */
static __always_inline int connects(struct bpf_sock_addr *ctx, const struct backend *asked, struct backend *got)
{
	struct frontend_key key = {};
	struct connected both = { .asked = *asked };
	const struct frontend *frontend;
	__u64 netns, cookie;

	if (!is_pod(ctx, &netns))
		return 0;
	cookie = bpf_get_socket_cookie(ctx);
	if (ctx->protocol == IPPROTO_UDP) {
		struct talk to = { .cookie = cookie, .peer = *asked };

		forget_answers(&to);
		return 0;
	}
	if (ctx->protocol != IPPROTO_TCP)
		return 0;
	frontend_key(&key, asked, IPPROTO_TCP);
	frontend = bpf_map_lookup_elem(&frontends, &key);
	if (!frontend)
		return 0;
	if (!(frontend->affinity_secs ? bring_back(frontend, netns, &key, got) : draw(frontend, &key, got)))
		return 0;
	both.got = *got;
	bpf_map_update_elem(&connected, &cookie, &both, BPF_ANY);
	return 1;
}

SEC("cgroup/connect4")
int sock_connect4(struct bpf_sock_addr *ctx)
{
	struct backend asked = {}, got = {};

	address_v4(&asked, ctx);
	/* A socket of this family cannot reach a backend of the other; the agent writes none. */
	if (connects(ctx, &asked, &got) && got.addr[2] == V4_MAPPED)
		put_v4(ctx, &got);
	return GO_ON;
}

SEC("cgroup/connect6")
int sock_connect6(struct bpf_sock_addr *ctx)
{
	struct backend asked = {}, got = {};

	address_v6(&asked, ctx);
	if (connects(ctx, &asked, &got))
		put_v6(ctx, &got);
	return GO_ON;
}

/* sendto() and sendmsg() of a UDP socket that is not connected: whether there is a backend for a datagram to `asked`. */
static __always_inline int sends(struct bpf_sock_addr *ctx, const struct backend *asked, struct backend *got)
{
	struct frontend_key key = {};
	struct talk talk = { .peer = *asked };
	const struct frontend *frontend;
	const struct backend *known;
	__u64 netns;

	/* One that is connected may name an address, too; yet it hears the address that it is connected to, and no other. */
	if (ctx->protocol != IPPROTO_UDP || ctx->sk->state == TCP_ESTABLISHED || !is_pod(ctx, &netns))
		return 0;
	talk.cookie = bpf_get_socket_cookie(ctx);
	frontend_key(&key, asked, IPPROTO_UDP);
	frontend = bpf_map_lookup_elem(&frontends, &key);
	if (!frontend) {
		forget_answers(&talk);
		return 0;
	}
	known = bpf_map_lookup_elem(&chosen, &talk);
	if (known)
		*got = *known;
	if (!known || !is_member(&key, got)) {
		if (!draw(frontend, &key, got))
			return 0;
		bpf_map_update_elem(&chosen, &talk, got, BPF_ANY);
	}
	talk.peer = *got;
	known = bpf_map_lookup_elem(&answers, &talk);
	if (!known)
		bpf_map_update_elem(&answers, &talk, asked, BPF_ANY);
	/* The socket hears another Service from there: nftables gives this one another port. */
	else if (!same(known, asked))
		return 0;
	return 1;
}

SEC("cgroup/sendmsg4")
int sock_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct backend asked = {}, got = {};

	address_v4(&asked, ctx);
	if (sends(ctx, &asked, &got) && got.addr[2] == V4_MAPPED)
		put_v4(ctx, &got);
	return GO_ON;
}

SEC("cgroup/sendmsg6")
int sock_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct backend asked = {}, got = {};

	address_v6(&asked, ctx);
	if (sends(ctx, &asked, &got))
		put_v6(ctx, &got);
	return GO_ON;
}

/* recvfrom() and recvmsg(): the Service that the socket asked, if the sender is one of its backends. */
static __always_inline const struct backend *answers_for(struct bpf_sock_addr *ctx, const struct backend *sender)
{
	struct talk talk = { .peer = *sender };

	if (ctx->protocol != IPPROTO_UDP)
		return 0;
	talk.cookie = bpf_get_socket_cookie(ctx);
	return bpf_map_lookup_elem(&answers, &talk);
}

SEC("cgroup/recvmsg4")
int sock_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct backend sender = {};
	const struct backend *asked;

	address_v4(&sender, ctx);
	asked = answers_for(ctx, &sender);
	if (asked)
		put_v4(ctx, asked);
	return GO_ON;
}

SEC("cgroup/recvmsg6")
int sock_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct backend sender = {};
	const struct backend *asked;

	address_v6(&sender, ctx);
	asked = answers_for(ctx, &sender);
	if (asked)
		put_v6(ctx, asked);
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
	if (asked)
		put_v4(ctx, asked);
	return GO_ON;
}

SEC("cgroup/getpeername6")
int sock_peername6(struct bpf_sock_addr *ctx)
{
	struct backend peer = {};
	const struct backend *asked;

	address_v6(&peer, ctx);
	asked = asked_for(ctx, &peer);
	if (asked)
		put_v6(ctx, asked);
	return GO_ON;
}
