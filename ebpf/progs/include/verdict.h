/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * Policy and flows. `judge` asks the tables, `decide` remembers what they said.
 */
#pragma once

#include "neighbour.h"

#define SECOND_NS 1000000000ULL
/* As netfilter's conntrack, so that the two forget a flow at about the same time. */
#define TCP_IDLE_NS (432000 * SECOND_NS)
#define TCP_CLOSED_NS (120 * SECOND_NS)
#define OTHER_IDLE_NS (180 * SECOND_NS)

/* Events per second and CPU; a reader of 1 MiB keeps up with that. */
#define EVENTS_PER_SECOND 2000

/* What a verdict rests on. */
struct basis {
	__u32 rule;
	__u32 peer_class;
};

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

/* What policy says of the flow that `flow` names, in its own direction. */
static __always_inline int judge_flow(const struct endpoint *endpoint, const struct flow_key *flow, struct basis *basis)
{
	__u8 direction = flow->direction;
	struct class_key class_key = { .prefix_len = WHOLE_ADDRESS, .family = flow->family };
	struct rule_key key = { .prefix_len = 64, .direction = direction, .protocol = flow->protocol };
	void *class_map, *table;
	struct rule *rule;
	__u32 *peer_class;

	if (endpoint->state == ENDPOINT_PENDING)
		return REASON_PENDING;
	if (endpoint->state != ENDPOINT_READY)
		return REASON_LOCKED;
	if (!(endpoint->flags & (direction == INGRESS ? ISOLATED_INGRESS : ISOLATED_EGRESS)))
		return REASON_NOT_ISOLATED;

	class_map = bpf_map_lookup_elem(&class_maps, &endpoint->class_map);
	table = bpf_map_lookup_elem(&tables, &endpoint->table);
	if (!class_map || !table)
		return REASON_NO_TABLE;
	class_key.addr = direction == INGRESS ? flow->saddr : flow->daddr;
	key.port = policy_port(flow->protocol, flow->dport);
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

static __always_inline int is_expired(const struct flow *flow, __u8 protocol, __u64 now)
{
	__u64 idle = now - flow->last_ns;

	if (protocol != IPPROTO_TCP)
		return idle > OTHER_IDLE_NS;
	return idle > (flow->tcp_flags & (TCP_FIN | TCP_RST) ? TCP_CLOSED_NS : TCP_IDLE_NS);
}

/* A packet of a flow that may be known: -1 if it is not, else the verdict. A change of policy is felt here. */
static __always_inline int follow(const struct endpoint *endpoint, const struct flow_key *key, __u8 tcp_flags,
				  __u8 *flags, struct basis *basis)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, key);
	__u64 now;
	int reason;

	if (!flow)
		return -1;
	now = bpf_ktime_get_ns();
	if (is_expired(flow, key->protocol, now))
		return -1;
	if (flow->generation != endpoint->generation) {
		/* What gets translated is judged after that, packet by packet. */
		reason = flow->flags & FLOW_DEFERRED ? REASON_DEFERRED : judge_flow(endpoint, key, basis);
		if (is_drop(reason)) {
			/* A cut TCP connection stays known as one that is judged at every packet: forgotten, it would be begun
			 * anew, the other way round, by the next packet of the pod that had been asked.
			 */
			if (key->protocol != IPPROTO_TCP)
				bpf_map_delete_elem(&flows, key);
			return REASON_REVOKED;
		}
		flow->generation = endpoint->generation;
		flow->rule = basis->rule;
	}
	flow->last_ns = now;
	flow->tcp_flags |= tcp_flags;
	__sync_fetch_and_add(&flow->packets, 1);
	*flags = flow->flags;
	return REASON_ESTABLISHED;
}

static __always_inline int remember(const struct endpoint *endpoint, const struct flow_key *key, __u8 tcp_flags,
				    __u8 flags, const struct basis *basis)
{
	struct flow flow = {
		.last_ns = bpf_ktime_get_ns(),
		.packets = 1,
		.generation = endpoint->generation,
		.rule = basis->rule,
		.tcp_flags = tcp_flags,
		.flags = flags,
	};

	return bpf_map_update_elem(&flows, key, &flow, BPF_ANY) ? REASON_FLOW_TABLE_FULL : 0;
}

static __always_inline void flow_key(const struct endpoint *endpoint, const struct packet *packet, __u8 direction,
				     struct flow_key *key)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->uid = endpoint->uid;
	key->saddr = packet->saddr;
	key->daddr = packet->daddr;
	key->sport = packet->sport;
	key->dport = packet->dport;
	key->protocol = packet->protocol;
	key->direction = direction;
	key->family = packet->family;
}

/* The flow to which `key`'s packets would be the answer. */
static __always_inline void reverse(const struct flow_key *key, struct flow_key *answered)
{
	__builtin_memset(answered, 0, sizeof(*answered));
	answered->uid = key->uid;
	answered->saddr = key->daddr;
	answered->daddr = key->saddr;
	answered->sport = key->dport;
	answered->dport = key->sport;
	answered->protocol = key->protocol;
	answered->direction = key->direction == INGRESS ? EGRESS : INGRESS;
	answered->family = key->family;
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
	struct flow_key key, answered;
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
	flow_key(endpoint, &quoted, towards, &key);
	if (bpf_map_lookup_elem(&flows, &key))
		return 1;
	reverse(&key, &answered);
	return bpf_map_lookup_elem(&flows, &answered) != 0;
}

/* A packet that begins a connection is never taken for a part of one. */
static __always_inline int begins(const struct packet *packet)
{
	return packet->protocol == IPPROTO_TCP && (packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}

static __always_inline int is_known(const struct endpoint *endpoint, const struct packet *packet,
				    const struct flow_key *key, __u8 *flags, struct basis *basis)
{
	struct flow_key answered;
	int reason;

	if (begins(packet))
		return -1;
	reverse(key, &answered);
	reason = follow(endpoint, &answered, packet->tcp_flags, flags, basis);
	if (reason >= 0) {
		/* An answer goes to whoever asked: nothing of it is left to judge. */
		*flags = 0;
		return reason;
	}
	return follow(endpoint, key, packet->tcp_flags, flags, basis);
}

static __always_inline void count(__u8 direction, int reason)
{
	__u32 index = direction * REASON_COUNT + reason;
	__u64 *packets = bpf_map_lookup_elem(&counters, &index);

	if (packets)
		*packets += 1;
}

static __always_inline int may_tell(__u64 now)
{
	__u32 zero = 0;
	struct event_budget *budget = bpf_map_lookup_elem(&event_budgets, &zero);

	if (!budget)
		return 0;
	if (budget->second != now / SECOND_NS) {
		budget->second = now / SECOND_NS;
		budget->spent = 0;
	}
	return budget->spent++ < EVENTS_PER_SECOND;
}

static __always_inline void tell(const struct __sk_buff *skb, const struct endpoint *endpoint, const struct packet *packet,
				 __u8 direction, int reason, const struct basis *basis)
{
	__u64 now = bpf_ktime_get_ns();
	struct event *event;

	if (!may_tell(now))
		return;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return;
	event->time_ns = now;
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
	bpf_ringbuf_submit(event, 0);
}

/* Counts, tells, and says it to the kernel. Frames for others, which a bridge floods, are no news; nor is what goes on, nor
 * what is no IP.
 */
static __always_inline int act(const struct __sk_buff *skb, const struct endpoint *endpoint, const struct packet *packet,
			       __u8 direction, int reason, const struct basis *basis)
{
	count(direction, reason);
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
	struct endpoint *sender;
	__u32 *ifindex;

	if (!(skb->mark & MARK_DEFERRED) || !skb->ingress_ifindex)
		return 0;
	ifindex = bpf_map_lookup_elem(&slots, &slot);
	if (!ifindex)
		return 0;
	sender = bpf_map_lookup_elem(&endpoints, ifindex);
	/* A slot is freed with its row, but not in the same instant. */
	return sender && sender->slot == slot ? sender : 0;
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
	__u8 flags = 0;
	int reason, full;

	flow_key(sender, packet, EGRESS, &key);
	reason = begins(packet) ? -1 : follow(sender, &key, packet->tcp_flags, &flags, basis);
	if (reason >= 0)
		return reason;
	reason = judge_flow(sender, &key, basis);
	if (is_drop(reason))
		return reason;
	full = remember(sender, &key, packet->tcp_flags, 0, basis);
	return full ? full : reason;
}
