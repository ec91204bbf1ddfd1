/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * Without neighbour discovery and multicast membership there is no IPv6 on a link, so they pass whatever policies say, as
 * ARP does; a pod speaks for itself alone in them. They cannot come from elsewhere than the link: discovery has a hop
 * limit of 255 (RFC 4861 §3.1), membership a link-local source (RFC 3810 §5).
 */
#pragma once

#include "parse.h"

#define ICMPV6_LISTENER_QUERY 130
#define ICMPV6_LISTENER_REPORT 131
#define ICMPV6_LISTENER_DONE 132
#define ICMPV6_ROUTER_SOLICITATION 133
#define ICMPV6_ROUTER_ADVERTISEMENT 134
#define ICMPV6_NEIGHBOUR_SOLICITATION 135
#define ICMPV6_NEIGHBOUR_ADVERTISEMENT 136
#define ICMPV6_REDIRECT 137
#define ICMPV6_LISTENER_REPORT_V2 143

#define DISCOVERY_HOP_LIMIT 255
/* Link-layer addresses of source and target; the kernel's other option there is a nonce. */
#define OPTION_SOURCE_MAC 1
#define OPTION_TARGET_MAC 2
#define MAX_OPTIONS 4

static __always_inline int is_multicast(const struct ip_addr *addr)
{
	return (bpf_ntohl(addr->words[0]) >> 24) == 0xff;
}

static __always_inline int is_link_local(const struct ip_addr *addr)
{
	return (bpf_ntohl(addr->words[0]) >> 22) == 0xfe80 >> 6;
}

/* The link-local address that follows from a MAC (RFC 4291 appendix A), which is the kernel's default. */
static __always_inline int is_link_local_of(const struct ip_addr *addr, const __u8 *mac)
{
	const __u8 *bytes = (const __u8 *)&addr->words[2];

	return addr->words[0] == bpf_htonl(0xfe800000) && !addr->words[1] && bytes[0] == (mac[0] ^ 2) &&
	       bytes[1] == mac[1] && bytes[2] == mac[2] && bytes[3] == 0xff && bytes[4] == 0xfe && bytes[5] == mac[3] &&
	       bytes[6] == mac[4] && bytes[7] == mac[5];
}

static __always_inline int is_own_ipv6(const struct endpoint *endpoint, const struct ip_addr *addr)
{
	if (is_same_addr(addr, &endpoint->addr6))
		return !is_unspecified(addr);
	return is_link_local_of(addr, endpoint->mac);
}

static __always_inline int is_discovery(const struct packet *packet)
{
	return packet->icmp_type >= ICMPV6_ROUTER_SOLICITATION && packet->icmp_type <= ICMPV6_REDIRECT;
}

static __always_inline int is_membership(const struct packet *packet)
{
	return (packet->icmp_type >= ICMPV6_LISTENER_QUERY && packet->icmp_type <= ICMPV6_LISTENER_DONE) ||
	       packet->icmp_type == ICMPV6_LISTENER_REPORT_V2;
}

/* Whether a packet for a pod belongs to the link. Its sender was checked where it sends. Parts of datagrams never do
 * (RFC 6980).
 */
static __always_inline int is_of_link(const struct packet *packet, const struct body *body)
{
	if (body->is_part)
		return 0;
	if (is_discovery(packet))
		return packet->hop_limit == DISCOVERY_HOP_LIMIT;
	return is_membership(packet) && (is_link_local(&packet->saddr) || is_unspecified(&packet->saddr));
}

/* Options of a solicitation or advertisement: a MAC in them has to be the pod's. */
static __always_inline int has_foreign_mac(struct __sk_buff *skb, const struct endpoint *endpoint, __u32 offset)
{
	struct {
		__u8 type;
		__u8 len;
		__u8 mac[6];
	} option;

	for (int i = 0; i < MAX_OPTIONS; i++) {
		if (bpf_skb_load_bytes(skb, offset, &option, sizeof(option)))
			return 0;
		if ((option.type == OPTION_SOURCE_MAC || option.type == OPTION_TARGET_MAC) &&
		    !is_same_mac(option.mac, endpoint->mac))
			return 1;
		/* Receivers throw such a message away (RFC 4861 §4.6). */
		if (!option.len)
			return 1;
		offset += option.len * 8;
	}
	return 1;
}

/* A pod's word to its link: the reason for which it passes or is dropped, or -1 if it is something else. */
static __always_inline int check_neighbour(struct __sk_buff *skb, const struct endpoint *endpoint,
					   const struct packet *packet, const struct body *body)
{
	struct ip_addr target;
	__u32 options = body->offset + 8;

	if (!is_discovery(packet) && !is_membership(packet))
		return -1;
	if (body->is_part)
		return REASON_MALFORMED;
	switch (packet->icmp_type) {
	case ICMPV6_LISTENER_REPORT:
	case ICMPV6_LISTENER_DONE:
	case ICMPV6_LISTENER_REPORT_V2:
		return REASON_NEIGHBOUR;
	case ICMPV6_NEIGHBOUR_SOLICITATION:
	case ICMPV6_NEIGHBOUR_ADVERTISEMENT:
		if (bpf_skb_load_bytes(skb, options, &target, sizeof(target)))
			return REASON_MALFORMED;
		options += sizeof(target);
		/* Whoever advertises, or looks for a duplicate before it has the address, claims it. */
		if ((packet->icmp_type == ICMPV6_NEIGHBOUR_ADVERTISEMENT || is_unspecified(&packet->saddr)) &&
		    !is_own_ipv6(endpoint, &target))
			return REASON_SPOOF;
		break;
	case ICMPV6_ROUTER_SOLICITATION:
		break;
	default:
		/* A pod that says it is a router would get its neighbours' packets (CVE-2020-10749). */
		return REASON_SPOOF;
	}
	if (packet->hop_limit != DISCOVERY_HOP_LIMIT)
		return REASON_MALFORMED;
	return has_foreign_mac(skb, endpoint, options) ? REASON_SPOOF : REASON_NEIGHBOUR;
}
