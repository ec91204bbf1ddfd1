/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * From a frame to a tuple. Helpers copy the headers, so it does not matter where in the buffer they are.
 */
#pragma once

#include "tables.h"

#define ETH_P_IP 0x0800
#define ETH_P_ARP 0x0806
#define ETH_P_IPV6 0x86dd
#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_ICMPV6 58
#define IPPROTO_SCTP 132

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define ICMP_ECHO_REPLY 0
#define ICMP_UNREACHABLE 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETER_PROBLEM 12

#define ICMPV6_ROUTER_ADVERTISEMENT 134

#define IPV6_HEADER_LEN 40
#define IPV6_NEXT_HEADER 6

#define IP_OFFSET_MASK 0x1fff
#define IP_MORE_FRAGMENTS 0x2000

struct eth_header {
	__u8 to[6];
	__u8 from[6];
	__be16 type;
};

struct ip_header {
	__u8 version_len;
	__u8 tos;
	__be16 total_len;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 protocol;
	__be16 checksum;
	__be32 saddr;
	__be32 daddr;
};

struct arp_packet {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_len;
	__u8 protocol_len;
	__be16 operation;
	__u8 sender_mac[6];
	__u8 sender_addr[4];
};

/* There is no memcmp to call. */
static __always_inline int is_same_mac(const __u8 *one, const __u8 *other)
{
	__u8 difference = 0;

#pragma unroll
	for (int i = 0; i < 6; i++)
		difference |= one[i] ^ other[i];
	return !difference;
}

/* What a verdict needs of a packet. An echo has its id as the port of the side that asks, and its type as the other
 * one: so an echo request never counts as the answer to one that went the other way.
 */
struct packet {
	__be32 saddr;
	__be32 daddr;
	__be16 sport;
	__be16 dport;
	__u8 protocol;
	__u8 tcp_flags;
	/* An ICMP error; the inner headers are at `inner`. */
	__u8 is_error;
	__u8 pad;
	__u32 inner;
};

/* Ports of what begins at `offset`. 0, or the reason to drop. */
static __always_inline int parse_ports(struct __sk_buff *skb, __u32 offset, struct packet *packet)
{
	struct {
		__u8 type;
		__u8 code;
		__be16 checksum;
		__be16 id;
	} icmp;
	struct {
		__be16 sport;
		__be16 dport;
	} ports;

	switch (packet->protocol) {
	case IPPROTO_TCP:
		if (bpf_skb_load_bytes(skb, offset + 13, &packet->tcp_flags, 1))
			return REASON_MALFORMED;
		/* fall through */
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		if (bpf_skb_load_bytes(skb, offset, &ports, sizeof(ports)))
			return REASON_MALFORMED;
		packet->sport = ports.sport;
		packet->dport = ports.dport;
		return 0;
	case IPPROTO_ICMP:
		if (bpf_skb_load_bytes(skb, offset, &icmp, sizeof(icmp)))
			return REASON_MALFORMED;
		if (icmp.type == ICMP_ECHO) {
			packet->sport = icmp.id;
			packet->dport = bpf_htons(ICMP_ECHO);
		} else if (icmp.type == ICMP_ECHO_REPLY) {
			packet->sport = bpf_htons(ICMP_ECHO);
			packet->dport = icmp.id;
		} else if (icmp.type == ICMP_UNREACHABLE || icmp.type == ICMP_TIME_EXCEEDED ||
			   icmp.type == ICMP_PARAMETER_PROBLEM) {
			packet->is_error = 1;
			packet->inner = offset + 8;
		}
		return 0;
	default:
		return 0;
	}
}

/* The IPv4 packet at `offset`, without what comes after its own header. 0, or the reason to drop. */
static __always_inline int parse_ip(struct __sk_buff *skb, __u32 offset, struct ip_header *ip, __u32 *payload)
{
	__u32 len;

	if (bpf_skb_load_bytes(skb, offset, ip, sizeof(*ip)))
		return REASON_MALFORMED;
	len = (ip->version_len & 0x0f) * 4;
	if (ip->version_len >> 4 != 4 || len < sizeof(*ip))
		return REASON_MALFORMED;
	*payload = offset + len;
	return 0;
}

/* The whole packet behind the Ethernet header. `uid` and `direction` tell apart whose fragments are remembered. With
 * `only_to`, packets to others are sent away before anything is remembered: bridges flood.
 */
static __always_inline int parse_packet(struct __sk_buff *skb, __u32 uid, __u8 direction, __be32 only_to,
					struct packet *packet)
{
	struct ip_header ip;
	__u32 payload;
	__u16 position;
	int reason;

	reason = parse_ip(skb, sizeof(struct eth_header), &ip, &payload);
	if (reason)
		return reason;
	packet->saddr = ip.saddr;
	packet->daddr = ip.daddr;
	packet->protocol = ip.protocol;
	if (only_to && ip.daddr != only_to)
		return REASON_NOT_MINE;

	position = bpf_ntohs(ip.fragment);
	if (position & (IP_OFFSET_MASK | IP_MORE_FRAGMENTS)) {
		struct fragment_key key = {
			.uid = uid,
			.saddr = ip.saddr,
			.daddr = ip.daddr,
			.id = ip.id,
			.protocol = ip.protocol,
			.direction = direction,
		};
		struct fragment *first, ports;

		if (position & IP_OFFSET_MASK) {
			first = bpf_map_lookup_elem(&fragments, &key);
			if (!first)
				return REASON_FRAGMENT_MISS;
			packet->sport = first->sport;
			packet->dport = first->dport;
			/* Later parts are no beginning of a connection, whatever their bytes say. */
			packet->tcp_flags = TCP_ACK;
			return 0;
		}
		reason = parse_ports(skb, payload, packet);
		if (reason)
			return reason;
		ports.sport = packet->sport;
		ports.dport = packet->dport;
		bpf_map_update_elem(&fragments, &key, &ports, BPF_ANY);
		return 0;
	}
	return parse_ports(skb, payload, packet);
}
