/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * Policy and flows. `judge` asks the tables, `decide` remembers what they said.
 */
#pragma once

#include "fresh.h"
#include "judged.h"
#include "neighbour.h"

/* Set by the loader. */
const volatile __u32 ticks_per_second SEC(".rodata") = 0;

/* As netfilter's conntrack, so that the two forget a flow at about the same time. In seconds. */
#define TCP_IDLE 432000ULL
#define TCP_CLOSED 120ULL
#define OTHER_IDLE 180ULL
/* Datagrams have no end: so long after the last one that was allowed, what is left of a cut flow has arrived or never will,
 * and the other side may begin one with the same ports.
 */
#define OTHER_CUT 30ULL

/* Events per CPU and unit of the clock of legs; a reader of 1 MiB keeps up with that. */
#define EVENTS_PER_UNIT 2000

/* No verdict: somebody else decides. */
#define REASON_UNDECIDED (REASON_COUNT - 1)

static __always_inline int is_drop(int reason)
{
	return reason >= FIRST_DROP;
}

/* Bits of a key that are enough for an address of either family. */
#define WHOLE_ADDRESS (FAMILY_BITS + 128)

static __always_inline __u32 address_flags(const struct packet *packet)
{
	struct class_key key = { .prefix_len = WHOLE_ADDRESS, .family = packet->family, .addr = packet->daddr };
	struct address *found = bpf_map_lookup_elem(&addresses, &key);

	return found ? found->flags : 0;
}

/* The policy's port: ICMP has none, whatever stands there to tell flows apart. */
static __always_inline __be16 policy_port(__u8 protocol, __be16 port)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP ? port : 0;
}

/* What the tables say of the flow if it is opened in this direction. */
static __always_inline int ask_tables(const struct endpoint *endpoint, const struct flow_key *flow, __u8 direction,
				      struct basis *basis)
{
	struct class_key class_key = { .prefix_len = WHOLE_ADDRESS, .family = flow->family, .addr = flow->remote };
	struct rule_key key = { .prefix_len = 64, .direction = direction, .protocol = flow->protocol };
	void *class_map, *table;
	struct rule *rule;
	__u32 *peer_class;

	class_map = bpf_map_lookup_elem(&class_maps, &endpoint->class_map);
	table = bpf_map_lookup_elem(&tables, &endpoint->table);
	if (!class_map || !table)
		return REASON_NO_TABLE;
	key.port = policy_port(flow->protocol, direction == INGRESS ? flow->local_port : flow->remote_port);
	peer_class = bpf_map_lookup_elem(class_map, &class_key);
	key.peer_class = peer_class ? *peer_class : CLASS_NONE;
	basis->peer_class = key.peer_class;
	rule = bpf_map_lookup_elem(table, &key);
	if (!rule && key.peer_class != CLASS_NONE) {
		key.peer_class = CLASS_NONE;
		rule = bpf_map_lookup_elem(table, &key);
	}
	if (!rule)
		return REASON_POLICY;
	basis->rule = rule->id;
	return rule->action == RULE_ALLOW ? REASON_ALLOWED : REASON_POLICY;
}

/* What holds whatever the tables say; -1 if they are to be asked. */
static __always_inline int judge_endpoint(const struct endpoint *endpoint, __u8 direction)
{
	if (endpoint->state == ENDPOINT_PENDING)
		return REASON_PENDING;
	if (endpoint->state != ENDPOINT_READY)
		return REASON_LOCKED;
	return endpoint->flags & (direction == INGRESS ? ISOLATED_INGRESS : ISOLATED_EGRESS) ? -1 : REASON_NOT_ISOLATED;
}

/* What policy says of the flow if it is opened in this direction. */
static __always_inline int judge_flow(const struct endpoint *endpoint, const struct flow_key *flow, __u8 direction,
				      struct basis *basis)
{
	int reason = judge_endpoint(endpoint, direction);

	return reason >= 0 ? reason : ask_tables(endpoint, flow, direction, basis);
}

/* The same of a flow that is being opened, which is asked often: from what the tables said last, if the question is the same. */
static __always_inline int judge_opening(const struct endpoint *endpoint, const struct flow_key *flow, __u8 direction,
					 struct basis *basis)
{
	struct question question = {
		.remote = flow->remote,
		.revision = endpoint->revision,
		.uid = endpoint->uid,
		.generation = endpoint->generation,
		.port = policy_port(flow->protocol, direction == INGRESS ? flow->local_port : flow->remote_port),
		.protocol = flow->protocol,
		.direction = direction,
		.family = flow->family,
	};
	int reason = judge_endpoint(endpoint, direction);
	struct judged *place;

	if (reason >= 0)
		return reason;
	place = judged_place(&question);
	if (place && place->reason && is_same_question(&place->question, &question)) {
		*basis = place->basis;
		return place->reason;
	}
	reason = ask_tables(endpoint, flow, direction, basis);
	if (place && reason != REASON_NO_TABLE) {
		place->question = question;
		place->basis = *basis;
		place->reason = reason;
	}
	return reason;
}

/* A TCP connection that is in the middle and not known: forgotten, or older than the programs. Whoever opened it is
 * judged for it; who that was, only the pod's sockets can tell, and until the agent has asked them (`strays`) the
 * connection goes on only if both sides could have been the one. To believe the packet would begin a connection anew
 * that policy cut, the other way round.
 */
static __always_inline int judge_either(const struct endpoint *endpoint, const struct flow_key *flow, __u8 direction,
					struct basis *basis)
{
	int reason = judge_flow(endpoint, flow, direction, basis), turned;
	struct basis unused = {};

	turned = judge_flow(endpoint, flow, direction == INGRESS ? EGRESS : INGRESS, &unused);
	return is_drop(reason) == is_drop(turned) ? reason : REASON_STRAY;
}

static __always_inline __u32 leg_clock(void)
{
	return bpf_jiffies64() >> LEG_CLOCK_SHIFT;
}

static __always_inline int is_idle(const struct leg *leg, __u64 seconds, __u32 now)
{
	return (__u64)(now - leg->last) << LEG_CLOCK_SHIFT > seconds * ticks_per_second;
}

static __always_inline int is_expired(const struct leg *leg, __u8 protocol, __u32 now)
{
	__u64 seconds = protocol != IPPROTO_TCP ? OTHER_IDLE : leg->tcp_flags & (TCP_FIN | TCP_RST) ? TCP_CLOSED : TCP_IDLE;

	return leg->last && is_idle(leg, seconds, now);
}

static __always_inline void forget(const struct flow_key *key, struct flow *flow, __u8 direction)
{
	if (flow->legs[direction == INGRESS ? EGRESS : INGRESS].is_open)
		flow->legs[direction].is_open = 0;
	else
		bpf_map_delete_elem(&flows, key);
}

/* A packet of a flow that may have been opened in this direction: -1 if it was not, else the verdict. A change of policy is
 * felt here.
 */
static __always_inline int follow(const struct endpoint *endpoint, const struct flow_key *key, struct flow *flow,
				  __u8 direction, __u8 tcp_flags, __u8 *flags, struct basis *basis)
{
	struct leg *leg = &flow->legs[direction];
	__u32 now = leg_clock();
	int reason;

	if (!leg->is_open)
		return -1;
	if (is_expired(leg, key->protocol, now)) {
		leg->is_open = 0;
		return -1;
	}
	if (leg->generation != endpoint->generation) {
		/* Who opened the connection may be known by now. */
		if (leg->flags & FLOW_EITHER) {
			forget(key, flow, direction);
			return -1;
		}
		/* What gets translated is judged after that, packet by packet. */
		reason = leg->flags & FLOW_DEFERRED ? REASON_DEFERRED : judge_flow(endpoint, key, direction, basis);
		if (is_drop(reason)) {
			/* What is cut stays known as something that is judged at every packet: forgotten, it would be begun anew,
			 * the other way round, by the next packet of the pod that had been asked.
			 */
			if (key->protocol != IPPROTO_TCP && is_idle(leg, OTHER_CUT, now))
				forget(key, flow, direction);
			return REASON_REVOKED;
		}
		leg->generation = endpoint->generation;
	}
	/* Written seldom: packets of a flow may be on several CPUs. */
	if (leg->last != now)
		leg->last = now;
	if (tcp_flags & ~leg->tcp_flags)
		leg->tcp_flags |= tcp_flags;
	*flags = leg->flags;
	return REASON_ESTABLISHED;
}

/* Tells that the flow was opened in this direction. What is known of the other one stays. */
static __always_inline int remember(const struct endpoint *endpoint, const struct flow_key *key, __u8 direction,
				    __u8 tcp_flags, __u8 flags)
{
	struct leg leg = {
		.last = leg_clock(),
		.generation = endpoint->generation,
		.tcp_flags = tcp_flags,
		.flags = flags,
		.is_open = 1,
	};
	struct flow *known = bpf_map_lookup_elem(&flows, key);
	__u8 towards = direction == INGRESS ? EGRESS : INGRESS;
	struct flow flow = {};
	struct fresh *fresh;

	/* Ports are used again: nothing has to be made. */
	if (known) {
		known->legs[direction] = leg;
	} else {
		flow.legs[direction] = leg;
		if (bpf_map_update_elem(&flows, key, &flow, BPF_ANY))
			return REASON_FLOW_TABLE_FULL;
	}
	/* The next packets of the flow mostly follow at once. */
	fresh = fresh_place(key, towards);
	if (fresh)
		freshen(fresh, key, towards, leg.generation, leg.last);
	fresh = flags ? 0 : fresh_place(key, direction);
	if (fresh)
		freshen(fresh, key, direction, leg.generation, leg.last);
	return 0;
}

/* The key of a packet that goes in this direction. Its own address is the endpoint's. */
static __always_inline void flow_key(const struct endpoint *endpoint, const struct packet *packet, __u8 direction,
				     struct flow_key *key)
{
	const struct ip_addr *local = direction == INGRESS ? &packet->daddr : &packet->saddr;

	__builtin_memset(key, 0, sizeof(*key));
	key->uid = endpoint->uid;
	key->remote = direction == INGRESS ? packet->saddr : packet->daddr;
	key->local_port = direction == INGRESS ? packet->dport : packet->sport;
	key->remote_port = direction == INGRESS ? packet->sport : packet->dport;
	key->protocol = packet->protocol;
	key->family = packet->family;
	if (packet->family == FAMILY_IPV6 && !is_same_addr(local, &endpoint->addr6))
		key->local = is_unspecified(local) ? LOCAL_NONE : LOCAL_LINK;
}

/* Whether the address is one that the endpoint speaks and hears with. */
static __always_inline int is_own(const struct endpoint *endpoint, __u8 family, const struct ip_addr *addr)
{
	return family == FAMILY_IPV4 ? addr->words[0] == endpoint->addr : is_own_ipv6(endpoint, addr);
}

/* An ICMP error is let through if the packet that it quotes belongs to a flow that is known. It came from the one who
 * now hears of it, so in the flow's terms it went the other way.
 */
static __always_inline int is_related(struct __sk_buff *skb, const struct endpoint *endpoint, const struct packet *packet,
				      __u8 direction)
{
	__u8 towards = direction == INGRESS ? EGRESS : INGRESS;
	struct packet quoted = {};
	struct body body = {};
	struct flow_key key;
	struct flow *flow;
	__u8 protocol;

	if (parse_addresses(skb, packet->inner, packet->family, &quoted, &body))
		return 0;
	if (packet->family == FAMILY_IPV6 && skip_extensions(skb, &quoted, &body))
		return 0;
	if (body.is_later)
		return 0;
	/* Routers quote eight bytes: enough for ports, not for TCP's flags. */
	protocol = quoted.protocol;
	if (protocol == IPPROTO_TCP)
		quoted.protocol = IPPROTO_UDP;
	if (parse_ports(skb, body.offset, &quoted) || quoted.is_error)
		return 0;
	quoted.protocol = protocol;
	if (!is_own(endpoint, quoted.family, towards == INGRESS ? &quoted.daddr : &quoted.saddr))
		return 0;
	flow_key(endpoint, &quoted, towards, &key);
	flow = bpf_map_lookup_elem(&flows, &key);
	return flow && (flow->legs[INGRESS].is_open || flow->legs[EGRESS].is_open);
}

/* A packet that begins a connection is never taken for a part of one. */
static __always_inline int begins(const struct packet *packet)
{
	return packet->protocol == IPPROTO_TCP && (packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}

/* Of a connection that began before. */
static __always_inline int goes_on(const struct packet *packet)
{
	return packet->protocol == IPPROTO_TCP && !begins(packet);
}

static __always_inline int search_known(const struct endpoint *endpoint, const struct packet *packet,
					const struct flow_key *key, __u8 direction, __u8 *flags, struct basis *basis)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, key);
	__u8 towards = direction == INGRESS ? EGRESS : INGRESS;
	int reason;

	if (!flow)
		return -1;
	reason = follow(endpoint, key, flow, towards, packet->tcp_flags, flags, basis);
	if (reason >= 0) {
		/* An answer goes to whoever asked: nothing of it is left to judge. */
		*flags = 0;
		return reason;
	}
	return follow(endpoint, key, flow, direction, packet->tcp_flags, flags, basis);
}

static __always_inline int is_known(const struct endpoint *endpoint, const struct packet *packet,
				    const struct flow_key *key, __u8 direction, __u8 *flags, struct basis *basis)
{
	struct fresh *fresh = 0;
	__u32 now = leg_clock();
	int reason;

	if (begins(packet))
		return -1;
	/* What ends a connection is to be seen by `flows`. */
	if (!(packet->tcp_flags & (TCP_FIN | TCP_RST)))
		fresh = fresh_place(key, direction);
	if (fresh && is_fresh(fresh, key, direction, endpoint->generation, now)) {
		*flags = 0;
		return REASON_ESTABLISHED;
	}
	reason = search_known(endpoint, packet, key, direction, flags, basis);
	if (fresh && reason == REASON_ESTABLISHED && !*flags)
		freshen(fresh, key, direction, endpoint->generation, now);
	return reason;
}

static __always_inline void count(__u8 direction, int reason)
{
	__u32 index = direction * REASON_COUNT + reason;
	__u64 *packets = bpf_map_lookup_elem(&counters, &index);

	if (packets)
		*packets += 1;
}

static __always_inline void lose(__u32 cause)
{
	__u64 *events = bpf_map_lookup_elem(&event_losses, &cause);

	if (events)
		*events += 1;
}

static __always_inline int may_tell(void)
{
	__u32 zero = 0, now = leg_clock();
	struct event_budget *budget = bpf_map_lookup_elem(&event_budgets, &zero);

	if (!budget)
		return 0;
	if (budget->unit != now) {
		budget->unit = now;
		budget->spent = 0;
	}
	return budget->spent++ < EVENTS_PER_UNIT;
}

static __always_inline void tell(const struct __sk_buff *skb, const struct endpoint *endpoint, const struct packet *packet,
				 __u8 direction, int reason, const struct basis *basis)
{
	struct event *event;

	if (!may_tell()) {
		lose(LOSS_BUDGET);
		return;
	}
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		lose(LOSS_RING_FULL);
		return;
	}
	event->time_ns = bpf_ktime_get_ns();
	event->uid = endpoint->uid;
	event->ifindex = skb->ifindex;
	event->saddr = packet->saddr;
	event->daddr = packet->daddr;
	event->sport = packet->sport;
	event->dport = packet->dport;
	event->protocol = packet->protocol;
	event->direction = direction;
	event->reason = reason;
	event->family = packet->family;
	event->rule = basis->rule;
	event->peer_class = basis->peer_class;
	/* Readers come by themselves. */
	bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
}

/* Counts, tells, and says it to the kernel. Frames for others, which a bridge floods, are no news; nor is what goes on, nor
 * what is no IP.
 */
static __always_inline int act(const struct __sk_buff *skb, const struct endpoint *endpoint, const struct packet *packet,
			       __u8 direction, int reason, const struct basis *basis)
{
	count(direction, reason);
	if (reason == REASON_STRAY) {
		__u32 uid = endpoint->uid, one = 1;

		bpf_map_update_elem(&strays, &uid, &one, BPF_ANY);
	}
	if (packet->family &&
	    (reason == REASON_ALLOWED || reason == REASON_NOT_ISOLATED || reason == REASON_DEFERRED ||
	     (is_drop(reason) && reason != REASON_NOT_MINE && reason != REASON_OTHER_PROTOCOL)))
		tell(skb, endpoint, packet, direction, reason, basis);
	return is_drop(reason) ? TCX_DROP : TCX_NEXT;
}

/* The sender of a packet whose destination has been translated since it left the pod. The packet must be the one that
 * from_pod marked, so it was not born here. The stack has no room for a copy of a second row.
 */
static __always_inline struct endpoint *deferred_by(const struct __sk_buff *skb)
{
	__u32 slot = skb->mark >> MARK_SLOT_SHIFT;
	struct row *sender;
	__u32 *ifindex;

	if (!(skb->mark & MARK_DEFERRED) || !skb->ingress_ifindex)
		return 0;
	ifindex = bpf_map_lookup_elem(&slots, &slot);
	if (!ifindex)
		return 0;
	sender = bpf_map_lookup_elem(&endpoints, ifindex);
	/* A slot is freed with its row, but not in the same instant. */
	return sender && sender->endpoint.slot == slot ? &sender->endpoint : 0;
}

/* The family of an Ethernet type; 0 if it is none of IP's. */
static __always_inline __u8 family_of(__be16 type)
{
	return type == bpf_htons(ETH_P_IP) ? FAMILY_IPV4 : type == bpf_htons(ETH_P_IPV6) ? FAMILY_IPV6 : 0;
}

/* Egress of `sender`, now that the destination is the real one. Answers to it go to the address before translation. */
static __always_inline int judge_deferred(const struct endpoint *sender, const struct packet *packet, struct basis *basis)
{
	struct flow_key key;
	struct flow *flow;
	__u8 flags = 0;
	int reason = -1, full;

	flow_key(sender, packet, EGRESS, &key);
	/* Whatever the source is by now, the sender is known. */
	key.local = LOCAL_ASSIGNED;
	flow = begins(packet) ? 0 : bpf_map_lookup_elem(&flows, &key);
	if (flow)
		reason = follow(sender, &key, flow, EGRESS, packet->tcp_flags, &flags, basis);
	if (reason >= 0)
		return reason;
	reason = judge_flow(sender, &key, EGRESS, basis);
	if (is_drop(reason))
		return reason;
	full = remember(sender, &key, EGRESS, packet->tcp_flags, 0);
	return full ? full : reason;
}
