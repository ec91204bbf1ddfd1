/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * VXLAN (RFC 7348) put around frames and taken off them by the programs themselves, past the device, the node's own IP and its
 * rules. A packet of many TCP segments is wrapped whole over IPv4, and segmented behind us like the device's. Over IPv6 it keeps
 * to the device: each segment needs an outer checksum, which programs cannot ask for. And none is unwrapped here: to the kernel
 * it would stay one that is to be segmented with a tunnel's headers, wherever the pod sends it.
 *
 * The overlay has a device for each family, which carries packets of its family between nodes' addresses of the same: so that
 * is what is done here, and a frame of the other family inside is the device's work.
 *
 * What the headers are is learned from the device: `fast_leave` sees them where a packet of it leaves the node. The same
 * row says whom to believe on the way in: a packet of this VTEP comes from the very address to which we send what is
 * for it, and that is what the agent has programmed for a node it knows.
 */
#pragma once

#include "fast_frame.h"

/* Bytes of an IPv4 packet that its header can say. */
#define LONGEST_IPV4 65535
/* "The VNI is valid", alone. */
#define VXLAN_FLAGS bpf_htonl(0x08000000)
/* Linux's range of ephemeral ports, from which its device takes the outer source port. */
#define VXLAN_PORT_MIN 32768
#define VXLAN_PORT_COUNT 28232
/* How old a row may be before it is written again. */
#define FAST_RENEW_NS (FAST_VALID_NS / 4)
/* For so long a packet may wait in the queue of the device. */
#define BULK_NS 10000000ULL

/* Behind the outer IP header, up to the inner one; aligned as what is behind an Ethernet header. */
struct vxlan_header {
	struct udp_header udp;
	__be32 flags;
	__be32 vni;
	struct eth_header inner;
} __attribute__((packed, aligned(2)));

struct vxlan_headers {
	struct ip_header ip;
	struct vxlan_header vxlan;
} __attribute__((packed, aligned(2)));

struct vxlan_headers6 {
	struct ipv6_header ip;
	struct vxlan_header vxlan;
} __attribute__((packed, aligned(2)));

/* What comes between the Ethernet header and the inner packet. */
#define VXLAN_ROOM ((__u32)sizeof(struct vxlan_headers))
#define VXLAN_ROOM_IPV6 ((__u32)sizeof(struct vxlan_headers6))

struct tunnel_key {
	__u8 vtep[6];
	__u8 pad[2];
};

struct tunnel {
	__u64 learned_ns; /* CLOCK_MONOTONIC_COARSE */
	/* Indexes: of the underlay's link, and of the VXLAN device once it is known. */
	__u32 link;
	__u32 device;
	__be32 saddr;
	__be32 daddr;
	__be32 vni;
	__be16 port;
	__be16 fragment;
	__u8 tos;
	__u8 ttl;
	__u8 to_mac[6];
	__u8 from_mac[6];
	__u8 pad[6];
};

/* Written by the programs. Full: the oldest go; the device does the work. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FAST_TUNNELS);
	__type(key, struct tunnel_key);
	__type(value, struct tunnel);
} fast_tunnels SEC(".maps");

struct tunnel6 {
	/* But for what the IPv4 header has. */
	struct tunnel common;
	struct ip_addr saddr;
	struct ip_addr daddr;
	/* ECN is that of each packet. */
	__be32 version_flow;
	__u8 hop_limit;
	__u8 pad[3];
};

/* A map of its own: the MACs of one node's two VTEPs may be the same. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FAST_TUNNELS);
	__type(key, struct tunnel_key);
	__type(value, struct tunnel6);
} fast_tunnels6 SEC(".maps");

static __always_inline struct tunnel *find_tunnel(const __u8 *vtep, int family, __u64 now)
{
	struct tunnel_key key = {};
	struct tunnel *tunnel;

	__builtin_memcpy(key.vtep, vtep, sizeof(key.vtep));
	/* The first member of a row of IPv6. */
	tunnel = family == FAMILY_IPV6 ? bpf_map_lookup_elem(&fast_tunnels6, &key) : bpf_map_lookup_elem(&fast_tunnels, &key);
	return tunnel && now - tunnel->learned_ns <= FAST_VALID_NS ? tunnel : 0;
}

static __always_inline int is_vxlan_port(__be16 port)
{
	__u32 zero = 0;
	struct config *config = bpf_map_lookup_elem(&settings, &zero);

	return config && config->vxlan_port && config->vxlan_port == port;
}

/* Whether a VXLAN packet is from and to the addresses of the tunnel. */
static __always_inline int is_through(const struct tunnel *tunnel, const struct fast_frame *outer, int family)
{
	const struct tunnel6 *tunnel6 = (const void *)tunnel;

	if (family == FAMILY_IPV6)
		return is_same_addr(&tunnel6->daddr, &outer->ip6->saddr) && is_same_addr(&tunnel6->saddr, &outer->ip6->daddr);
	return tunnel->daddr == outer->ip->saddr && tunnel->saddr == outer->ip->daddr;
}

/* What both families' rows have. */
static __always_inline void learn_common(const struct __sk_buff *skb, const struct eth_header *eth,
					 const struct vxlan_header *vxlan, struct tunnel *tunnel)
{
	tunnel->learned_ns = bpf_ktime_get_coarse_ns();
	tunnel->link = skb->ifindex;
	tunnel->vni = vxlan->vni;
	tunnel->port = vxlan->udp.destination;
	__builtin_memcpy(tunnel->to_mac, eth->to, sizeof(tunnel->to_mac));
	__builtin_memcpy(tunnel->from_mac, eth->from, sizeof(tunnel->from_mac));
}

/* Whether the row of the VTEP to which a VXLAN packet goes is to be written. */
static __always_inline int is_news(const struct vxlan_header *vxlan, int family)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	struct tunnel *known;

	if (vxlan->flags != VXLAN_FLAGS)
		return 0;
	known = find_tunnel(vxlan->inner.to, family, now);
	return !known || now - known->learned_ns >= FAST_RENEW_NS;
}

/* A VXLAN packet leaves: this is how others for the same VTEP have to look. */
static __always_inline void learn_tunnel(struct __sk_buff *skb)
{
	struct {
		struct eth_header eth;
		struct vxlan_headers outer;
	} __attribute__((packed, aligned(2))) headers;
	struct tunnel_key key = {};
	struct tunnel tunnel = {};

	if (bpf_skb_load_bytes(skb, 0, &headers, sizeof(headers)) || !is_news(&headers.outer.vxlan, FAMILY_IPV4))
		return;
	__builtin_memcpy(key.vtep, headers.outer.vxlan.inner.to, sizeof(key.vtep));
	learn_common(skb, &headers.eth, &headers.outer.vxlan, &tunnel);
	tunnel.saddr = headers.outer.ip.saddr;
	tunnel.daddr = headers.outer.ip.daddr;
	tunnel.fragment = headers.outer.ip.fragment & bpf_htons(IP_DONT_FRAGMENT);
	tunnel.tos = headers.outer.ip.tos & ~ECN_MASK;
	tunnel.ttl = headers.outer.ip.ttl;
	bpf_map_update_elem(&fast_tunnels, &key, &tunnel, BPF_ANY);
}

/* The same over IPv6. */
static __always_inline void learn_tunnel6(struct __sk_buff *skb)
{
	struct {
		struct eth_header eth;
		struct vxlan_headers6 outer;
	} __attribute__((packed, aligned(2))) headers;
	struct tunnel6 tunnel = {};
	struct tunnel_key key = {};

	if (bpf_skb_load_bytes(skb, 0, &headers, sizeof(headers)) || !is_news(&headers.outer.vxlan, FAMILY_IPV6))
		return;
	__builtin_memcpy(key.vtep, headers.outer.vxlan.inner.to, sizeof(key.vtep));
	learn_common(skb, &headers.eth, &headers.outer.vxlan, &tunnel.common);
	tunnel.saddr = headers.outer.ip.saddr;
	tunnel.daddr = headers.outer.ip.daddr;
	tunnel.version_flow = headers.outer.ip.version_flow & ~bpf_htonl(ECN_MASK << 20);
	tunnel.hop_limit = headers.outer.ip.hop_limit;
	bpf_map_update_elem(&fast_tunnels6, &key, &tunnel, BPF_ANY);
}

/* A sum of 16-bit words in one's complement, of all that was added. */
static __always_inline __u16 folded(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

static __always_inline __u64 sum_of_macs(const struct eth_header *eth)
{
	const __u16 *words = (const void *)eth;
	__u64 sum = 0;

#pragma unroll
	for (int i = 0; i < (int)(sizeof(*eth) / 2); i++)
		sum += words[i];
	return sum;
}

static __always_inline __u64 sum_of_addr(const struct ip_addr *addr)
{
	return (__u64)addr->words[0] + addr->words[1] + addr->words[2] + addr->words[3];
}

static __always_inline __u16 ip_checksum(const struct ip_header *ip)
{
	const __u16 *words = (const void *)ip;
	__u32 sum = 0;

#pragma unroll
	for (int i = 0; i < (int)(sizeof(*ip) / 2); i++)
		sum += words[i];
	return ~folded(sum);
}

/* What a VXLAN packet has behind its outer IP header, and before that. `length` is that of the UDP datagram. */
static __always_inline void fill_headers(struct __sk_buff *skb, const struct tunnel *tunnel, const struct fast_flow *flow,
					 __be16 type, __u16 length, struct eth_header *eth, struct vxlan_header *vxlan)
{
	__u32 hash = bpf_get_hash_recalc(skb);

	vxlan->udp.source = bpf_htons(VXLAN_PORT_MIN + (__u16)(((__u64)hash * VXLAN_PORT_COUNT) >> 32));
	vxlan->udp.destination = tunnel->port;
	vxlan->udp.length = bpf_htons(length);
	vxlan->flags = VXLAN_FLAGS;
	vxlan->vni = tunnel->vni;
	vxlan->inner.type = type;
	__builtin_memcpy(vxlan->inner.to, flow->to_mac, sizeof(flow->to_mac));
	__builtin_memcpy(vxlan->inner.from, flow->from_mac, sizeof(flow->from_mac));
	__builtin_memcpy(eth->to, tunnel->to_mac, sizeof(eth->to));
	__builtin_memcpy(eth->from, tunnel->from_mac, sizeof(eth->from));
	eth->type = type;
}

#define ENCAPSULATION                                                                                                    \
	(BPF_F_ADJ_ROOM_ENCAP_L4_UDP | BPF_F_ADJ_ROOM_ENCAP_L2_ETH | BPF_F_ADJ_ROOM_ENCAP_L2(sizeof(struct eth_header)))

/* There is no outer checksum, as the RFC recommends: the inner one covers the data. */
static __always_inline int wrap_ipv4(struct __sk_buff *skb, const struct tunnel *tunnel, const struct fast_flow *flow, __u8 tos)
{
	struct vxlan_headers headers = {};
	struct ip_header ip = {};
	struct eth_header eth;
	__u32 length = skb->len + VXLAN_ROOM - sizeof(eth);

	if (length > LONGEST_IPV4)
		return 0;
	ip.version_len = PLAIN_IP;
	ip.tos = tunnel->tos | (tos & ECN_MASK);
	ip.total_len = bpf_htons(length);
	ip.id = tunnel->fragment ? 0 : bpf_get_prandom_u32();
	ip.fragment = tunnel->fragment;
	ip.ttl = tunnel->ttl;
	ip.protocol = IPPROTO_UDP;
	ip.saddr = tunnel->saddr;
	ip.daddr = tunnel->daddr;
	ip.checksum = ip_checksum(&ip);
	headers.ip = ip;
	fill_headers(skb, tunnel, flow, bpf_htons(ETH_P_IP), length - sizeof(ip), &eth, &headers.vxlan);
	if (bpf_skb_adjust_room(skb, VXLAN_ROOM, BPF_ADJ_ROOM_MAC,
				ENCAPSULATION | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_FIXED_GSO))
		return 0;
	if (bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0) ||
	    bpf_skb_store_bytes(skb, sizeof(eth), &headers, sizeof(headers), 0))
		return -1;
	return 1;
}

/* UDP over IPv6 has a checksum, and the other node's device drops a packet without. It is the same whatever the packet carries:
 * the inner checksum, right already or still the link's to fill in, makes the sum of all from the inner transport header on the
 * complement of the inner pseudo-header; and of that, addresses and length are in the inner IPv6 header once more, and cancel
 * out ("local checksum offload" of kernel doc networking/checksum-offloads). A packet whose inner checksum is wrong is so dropped
 * by the other node instead of its pod.
 */
static __always_inline int wrap_ipv6(struct __sk_buff *skb, const struct tunnel *tunnel, const struct fast_flow *flow,
				     const struct fast_frame *frame, __u8 tos)
{
	const struct udp_header *udp = (const void *)frame->ports;
	const struct tunnel6 *tunnel6 = (const void *)tunnel;
	struct vxlan_headers6 headers = {};
	struct ipv6_header ip = {};
	struct eth_header eth;
	__u16 length = skb->len + VXLAN_ROOM_IPV6 - sizeof(eth) - sizeof(ip);
	__u64 sum;

	/* There must be an inner checksum, over all that there is. */
	if (skb->len != sizeof(eth) + sizeof(ip) + bpf_ntohs(frame->ip6->payload_len) ||
	    (frame->protocol == IPPROTO_UDP && (!udp->checksum || udp->length != frame->ip6->payload_len)))
		return 0;
	ip.version_flow = tunnel6->version_flow | bpf_htonl((tos & ECN_MASK) << 20);
	ip.payload_len = bpf_htons(length);
	ip.next = IPPROTO_UDP;
	ip.hop_limit = tunnel6->hop_limit;
	ip.saddr = tunnel6->saddr;
	ip.daddr = tunnel6->daddr;
	headers.ip = ip;
	fill_headers(skb, tunnel, flow, bpf_htons(ETH_P_IPV6), length, &eth, &headers.vxlan);
	/* The pseudo-header, UDP, VXLAN, the inner Ethernet header, and what is left of the inner packet. */
	sum = sum_of_addr(&ip.saddr) + sum_of_addr(&ip.daddr) + ip.payload_len + bpf_htons(IPPROTO_UDP);
	sum += (__u64)headers.vxlan.udp.source + headers.vxlan.udp.destination + headers.vxlan.udp.length;
	sum += (__u64)headers.vxlan.flags + headers.vxlan.vni + sum_of_macs(&headers.vxlan.inner);
	sum += (__u64)frame->ip6->version_flow + bpf_htons(frame->protocol << 8 | frame->ip6->hop_limit) +
	       (__u16)~bpf_htons(frame->protocol);
	headers.vxlan.udp.checksum = ~folded(sum);
	if (!headers.vxlan.udp.checksum)
		headers.vxlan.udp.checksum = 0xffff;
	if (bpf_skb_adjust_room(skb, VXLAN_ROOM_IPV6, BPF_ADJ_ROOM_MAC, ENCAPSULATION | BPF_F_ADJ_ROOM_ENCAP_L3_IPV6))
		return 0;
	if (bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0) ||
	    bpf_skb_store_bytes(skb, sizeof(eth), &headers, sizeof(headers), 0))
		return -1;
	return 1;
}

/* Puts VXLAN around a frame. 1 if done; 0 if the frame is as it was; -1 if it is spoiled. */
static __always_inline int wrap(struct __sk_buff *skb, struct tunnel *tunnel, const struct fast_flow *flow,
				const struct fast_frame *frame, int family)
{
	__u8 tos = frame_tos(frame, family);

	if (skb->gso_size && (family == FAMILY_IPV6 || frame->protocol != IPPROTO_TCP))
		return 0;
	/* Congestion is carried inside and must not be told twice (RFC 6040): the device knows how. */
	if ((tos & ECN_MASK) == ECN_CE)
		return 0;
	if (tunnel->device != flow->leaves)
		tunnel->device = flow->leaves;
	return family == FAMILY_IPV6 ? wrap_ipv6(skb, tunnel, flow, frame, tos) : wrap_ipv4(skb, tunnel, flow, tos);
}
