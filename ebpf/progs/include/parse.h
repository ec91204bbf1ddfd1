/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * From a frame to a tuple. Plain frames are read where they lie (`plain_frame`). Of all others helpers copy the headers, so
 * it does not matter where in the buffer they are.
 *
 * The others in two steps: `parse_addresses` says who speaks to whom, `parse_body` what about. What cannot be read is dropped, and so
 * is what could mean something else to the receiver than to us: a chain of headers that is too long, a routing header
 * that names another destination, a fragment whose first part we did not see.
 */
#pragma once

#include "tables.h"

#define ETH_P_IP 0x0800
#define ETH_P_ARP 0x0806
#define ETH_P_IPV6 0x86dd
#define IPPROTO_HOP_BY_HOP 0
#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_AUTHENTICATION 51
#define IPPROTO_ICMPV6 58
#define IPPROTO_DESTINATION_OPTIONS 60
#define IPPROTO_SCTP 132

/* Extension headers of one packet. A stack sends each kind once, the destination options twice (RFC 8200 §4.1). */
#define MAX_EXTENSIONS 6

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define ICMP_ECHO_REPLY 0
#define ICMP_UNREACHABLE 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETER_PROBLEM 12

#define ICMPV6_UNREACHABLE 1
#define ICMPV6_PARAMETER_PROBLEM 4
#define ICMPV6_ECHO 128
#define ICMPV6_ECHO_REPLY 129

#define IP_DONT_FRAGMENT 0x4000
#define IP_OFFSET_MASK 0x1fff
#define IP_MORE_FRAGMENTS 0x2000
#define IPV6_OFFSET_MASK 0xfff8
#define IPV6_MORE_FRAGMENTS 0x0001

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

struct ipv6_header {
	__be32 version_flow;
	__be16 payload_len;
	__u8 next;
	__u8 hop_limit;
	struct ip_addr saddr;
	struct ip_addr daddr;
};

/* What all extension headers begin with, and what a fragment header is. */
struct extension_header {
	__u8 next;
	__u8 len;
	/* Of a routing header: type and segments left. */
	__be16 fragment;
	__be32 id;
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

static __always_inline int is_same_addr(const struct ip_addr *one, const struct ip_addr *other)
{
	return !((one->words[0] ^ other->words[0]) | (one->words[1] ^ other->words[1]) |
		 (one->words[2] ^ other->words[2]) | (one->words[3] ^ other->words[3]));
}

static __always_inline int is_unspecified(const struct ip_addr *addr)
{
	return !(addr->words[0] | addr->words[1] | addr->words[2] | addr->words[3]);
}

/* What a verdict needs of a packet. An echo has its id as the port of the side that asks, and its type as the other
 * one: so an echo request never counts as the answer to one that went the other way.
 */
struct packet {
	struct ip_addr saddr;
	struct ip_addr daddr;
	__be16 sport;
	__be16 dport;
	__u8 protocol;
	__u8 tcp_flags;
	__u8 family;
	/* An ICMP error; the inner headers are at `inner`. */
	__u8 is_error;
	__u32 inner;
	/* Of ICMPv6. */
	__u8 icmp_type;
	/* Of IPv6. */
	__u8 hop_limit;
	__u8 pad[2];
};

/* Without options, and whole, which is how nearly all packets are. */
#define PLAIN_IP 0x45
#define SHORTEST (sizeof(struct eth_header) + sizeof(struct ip_header) + 8)
#define TCP_FLAGS_AT (sizeof(struct eth_header) + sizeof(struct ip_header) + 13)

struct ports_header {
	__be16 source;
	__be16 destination;
};

/* Where the headers of a plain frame are; TCP and UDP have their ports at the same place. */
struct plain_frame {
	struct eth_header *eth;
	struct ip_header *ip;
	struct ports_header *ports;
	/* Of TCP: its header's length in bytes. */
	__u8 tcp_len;
	__u8 tcp_flags;
};

/* The frame at `offset`, read where it lies; 0 if it is of another kind, or its headers are not in the buffer's first part. */
static __always_inline int plain_frame(struct __sk_buff *skb, __u32 offset, struct plain_frame *frame)
{
	__u8 *start = (__u8 *)(long)skb->data + offset, *end = (void *)(long)skb->data_end;

	if (skb->vlan_present || start + SHORTEST > end)
		return 0;
	frame->eth = (void *)start;
	frame->ip = (void *)(start + sizeof(*frame->eth));
	frame->ports = (void *)(start + sizeof(*frame->eth) + sizeof(*frame->ip));
	frame->tcp_len = 0;
	frame->tcp_flags = 0;
	if (frame->eth->type != bpf_htons(ETH_P_IP) || frame->ip->version_len != PLAIN_IP ||
	    frame->ip->fragment & ~bpf_htons(IP_DONT_FRAGMENT))
		return 0;
	if (frame->ip->protocol == IPPROTO_UDP)
		return 1;
	if (frame->ip->protocol != IPPROTO_TCP || start + TCP_FLAGS_AT + 1 > end)
		return 0;
	frame->tcp_len = start[TCP_FLAGS_AT - 1] >> 4 << 2;
	frame->tcp_flags = start[TCP_FLAGS_AT];
	return 1;
}

static __always_inline void parse_plain(const struct plain_frame *frame, struct packet *packet)
{
	packet->family = FAMILY_IPV4;
	packet->saddr.words[0] = frame->ip->saddr;
	packet->daddr.words[0] = frame->ip->daddr;
	packet->protocol = frame->ip->protocol;
	packet->sport = frame->ports->source;
	packet->dport = frame->ports->destination;
	packet->tcp_flags = frame->tcp_flags;
}

/* Where the packet goes on behind its addresses. */
struct body {
	__u32 offset;
	/* Of a part of a datagram. */
	__be32 id;
	__u8 is_part;
	__u8 is_later;
	__u8 pad[2];
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
	__u8 is_ipv6 = packet->family == FAMILY_IPV6;

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
	case IPPROTO_ICMPV6:
		/* The other family's is a protocol as any other. */
		if (is_ipv6 != (packet->protocol == IPPROTO_ICMPV6))
			return 0;
		if (bpf_skb_load_bytes(skb, offset, &icmp, sizeof(icmp)))
			return REASON_MALFORMED;
		if (is_ipv6)
			packet->icmp_type = icmp.type;
		if (icmp.type == (is_ipv6 ? ICMPV6_ECHO : ICMP_ECHO)) {
			packet->sport = icmp.id;
			packet->dport = bpf_htons(icmp.type);
		} else if (icmp.type == (is_ipv6 ? ICMPV6_ECHO_REPLY : ICMP_ECHO_REPLY)) {
			packet->sport = is_ipv6 ? bpf_htons(ICMPV6_ECHO) : bpf_htons(ICMP_ECHO);
			packet->dport = icmp.id;
		} else if (is_ipv6 ? icmp.type >= ICMPV6_UNREACHABLE && icmp.type <= ICMPV6_PARAMETER_PROBLEM :
				     icmp.type == ICMP_UNREACHABLE || icmp.type == ICMP_TIME_EXCEEDED ||
					     icmp.type == ICMP_PARAMETER_PROBLEM) {
			packet->is_error = 1;
			packet->inner = offset + 8;
		}
		return 0;
	default:
		return 0;
	}
}

/* The IPv4 header at `offset`. 0, or the reason to drop. */
static __always_inline int parse_ipv4(struct __sk_buff *skb, __u32 offset, struct packet *packet, struct body *body)
{
	struct ip_header ip;
	__u16 position;
	__u32 len;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
		return REASON_MALFORMED;
	len = (ip.version_len & 0x0f) * 4;
	if (ip.version_len >> 4 != 4 || len < sizeof(ip))
		return REASON_MALFORMED;
	packet->family = FAMILY_IPV4;
	packet->saddr.words[0] = ip.saddr;
	packet->daddr.words[0] = ip.daddr;
	packet->protocol = ip.protocol;
	position = bpf_ntohs(ip.fragment);
	body->offset = offset + len;
	body->id = ip.id;
	body->is_part = !!(position & (IP_OFFSET_MASK | IP_MORE_FRAGMENTS));
	body->is_later = !!(position & IP_OFFSET_MASK);
	return 0;
}

/* The IPv6 header at `offset`, without extensions. */
static __always_inline int parse_ipv6(struct __sk_buff *skb, __u32 offset, struct packet *packet, struct body *body)
{
	struct ipv6_header ip;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
		return REASON_MALFORMED;
	if ((bpf_ntohl(ip.version_flow) >> 28) != 6)
		return REASON_MALFORMED;
	packet->family = FAMILY_IPV6;
	packet->saddr = ip.saddr;
	packet->daddr = ip.daddr;
	packet->protocol = ip.next;
	packet->hop_limit = ip.hop_limit;
	body->offset = offset + sizeof(ip);
	return 0;
}

static __always_inline int parse_addresses(struct __sk_buff *skb, __u32 offset, __u8 family, struct packet *packet,
					   struct body *body)
{
	return family == FAMILY_IPV6 ? parse_ipv6(skb, offset, packet, body) : parse_ipv4(skb, offset, packet, body);
}

/* Goes over the extension headers of IPv6 to what they carry. 0, or the reason to drop. */
static __always_inline int skip_extensions(struct __sk_buff *skb, struct packet *packet, struct body *body)
{
	struct extension_header header;
	__u16 position;

	for (int i = 0; i <= MAX_EXTENSIONS; i++) {
		switch (packet->protocol) {
		case IPPROTO_HOP_BY_HOP:
		case IPPROTO_DESTINATION_OPTIONS:
		case IPPROTO_ROUTING:
		case IPPROTO_AUTHENTICATION:
		case IPPROTO_FRAGMENT:
			break;
		default:
			return 0;
		}
		if (bpf_skb_load_bytes(skb, body->offset, &header, sizeof(header)))
			return REASON_MALFORMED;
		position = bpf_ntohs(header.fragment);
		if (packet->protocol == IPPROTO_FRAGMENT) {
			if (body->is_part)
				return REASON_MALFORMED;
			/* One that is all of its datagram is none (RFC 6946). */
			body->is_part = !!(position & (IPV6_OFFSET_MASK | IPV6_MORE_FRAGMENTS));
			body->is_later = !!(position & IPV6_OFFSET_MASK);
			body->id = header.id;
			body->offset += sizeof(header);
			packet->protocol = header.next;
			/* What follows is data, even where it looks like a header. */
			if (body->is_later)
				return 0;
			continue;
		}
		/* There is another destination behind the one that was judged. */
		if (packet->protocol == IPPROTO_ROUTING && position & 0xff)
			return REASON_EXTENSION;
		body->offset += packet->protocol == IPPROTO_AUTHENTICATION ? (header.len + 2) * 4 : (header.len + 1) * 8;
		packet->protocol = header.next;
	}
	return REASON_EXTENSION;
}

/* What the packet says, behind its addresses. `uid` and `direction` tell apart whose fragments are remembered. 0, or the
 * reason to drop.
 */
static __always_inline int parse_body(struct __sk_buff *skb, __u32 uid, __u8 direction, struct packet *packet,
				      struct body *body)
{
	struct fragment_key key = {};
	struct fragment ports = {}, *first;
	int reason;

	if (packet->family == FAMILY_IPV6) {
		reason = skip_extensions(skb, packet, body);
		if (reason)
			return reason;
	}
	if (!body->is_part)
		return parse_ports(skb, body->offset, packet);

	key.uid = uid;
	key.saddr = packet->saddr;
	key.daddr = packet->daddr;
	key.id = body->id;
	key.protocol = packet->family == FAMILY_IPV6 ? 0 : packet->protocol;
	key.direction = direction;
	key.family = packet->family;
	if (body->is_later) {
		first = bpf_map_lookup_elem(&fragments, &key);
		if (!first)
			return REASON_FRAGMENT_MISS;
		packet->sport = first->sport;
		packet->dport = first->dport;
		packet->protocol = first->protocol;
		/* Later parts are no beginning of a connection, whatever their bytes say. */
		packet->tcp_flags = TCP_ACK;
		return 0;
	}
	reason = parse_ports(skb, body->offset, packet);
	if (reason)
		return reason;
	ports.sport = packet->sport;
	ports.dport = packet->dport;
	ports.protocol = packet->protocol;
	bpf_map_update_elem(&fragments, &key, &ports, BPF_ANY);
	return 0;
}
