/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * VXLAN (RFC 7348) put around frames and taken off them by the programs themselves, past the device, the node's own IP and its
 * rules. Single packets only: those of many segments keep to the device, which the kernel's segmentation knows.
 *
 * What the headers are is learned from the device: `fast_leave` sees them where a packet of it leaves the node. The same
 * row says whom to believe on the way in: a packet of this VTEP comes from the very address to which we send what is
 * for it, and that is what the agent has programmed for a node it knows.
 */
#pragma once

#include "fast_path.h"

/* "The VNI is valid", alone. */
#define VXLAN_FLAGS bpf_htonl(0x08000000)
#define ECN_MASK 0x03
#define ECN_CE 0x03
/* Linux's range of ephemeral ports, from which its device takes the outer source port. */
#define VXLAN_PORT_MIN 32768
#define VXLAN_PORT_COUNT 28232
/* How old a row may be before it is written again. */
#define FAST_RENEW_NS (FAST_VALID_NS / 4)
/* For so long a packet may wait in the queue of the device. */
#define BULK_NS 10000000ULL

struct vxlan_headers {
	struct ip_header ip;
	__be16 sport;
	__be16 dport;
	__be16 length;
	__be16 checksum;
	__be32 flags;
	__be32 vni;
	struct eth_header inner;
} __attribute__((packed));

/* What comes between the Ethernet header and the inner packet. */
#define VXLAN_ROOM ((__u32)sizeof(struct vxlan_headers))

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

static __always_inline struct tunnel *find_tunnel(const __u8 *vtep, __u64 now)
{
	struct tunnel_key key = {};
	struct tunnel *tunnel;

	__builtin_memcpy(key.vtep, vtep, sizeof(key.vtep));
	tunnel = bpf_map_lookup_elem(&fast_tunnels, &key);
	return tunnel && now - tunnel->learned_ns <= FAST_VALID_NS ? tunnel : 0;
}

static __always_inline int is_vxlan_port(__be16 port)
{
	__u32 zero = 0;
	struct config *config = bpf_map_lookup_elem(&settings, &zero);

	return config && config->vxlan_port && config->vxlan_port == port;
}

/* A VXLAN packet leaves: this is how others for the same VTEP have to look. */
static __always_inline void learn_tunnel(struct __sk_buff *skb)
{
	struct {
		struct eth_header eth;
		struct vxlan_headers vxlan;
	} __attribute__((packed)) headers;
	__u64 now = bpf_ktime_get_coarse_ns();
	struct tunnel tunnel = {}, *known;
	struct tunnel_key key = {};

	if (bpf_skb_load_bytes(skb, 0, &headers, sizeof(headers)) || headers.vxlan.flags != VXLAN_FLAGS)
		return;
	known = find_tunnel(headers.vxlan.inner.to, now);
	if (known && now - known->learned_ns < FAST_RENEW_NS)
		return;
	__builtin_memcpy(key.vtep, headers.vxlan.inner.to, sizeof(key.vtep));
	tunnel.learned_ns = now;
	tunnel.link = skb->ifindex;
	tunnel.saddr = headers.vxlan.ip.saddr;
	tunnel.daddr = headers.vxlan.ip.daddr;
	tunnel.vni = headers.vxlan.vni;
	tunnel.port = headers.vxlan.dport;
	tunnel.fragment = headers.vxlan.ip.fragment & bpf_htons(IP_DONT_FRAGMENT);
	tunnel.tos = headers.vxlan.ip.tos & ~ECN_MASK;
	tunnel.ttl = headers.vxlan.ip.ttl;
	__builtin_memcpy(tunnel.to_mac, headers.eth.to, sizeof(tunnel.to_mac));
	__builtin_memcpy(tunnel.from_mac, headers.eth.from, sizeof(tunnel.from_mac));
	bpf_map_update_elem(&fast_tunnels, &key, &tunnel, BPF_ANY);
}

static __always_inline __u16 ip_checksum(const struct ip_header *ip)
{
	const __u16 *words = (const void *)ip;
	__u32 sum = 0;

#pragma unroll
	for (int i = 0; i < (int)(sizeof(*ip) / 2); i++)
		sum += words[i];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* Puts VXLAN around a frame whose IP header has the type of service `tos`. 1 if done; 0 if the frame is as it was; -1 if it
 * is spoiled. There is no outer checksum, as the RFC recommends: the inner one covers the data.
 */
static __always_inline int wrap(struct __sk_buff *skb, struct tunnel *tunnel, const struct fast_flow *flow, __u8 tos)
{
	struct vxlan_headers vxlan = {};
	struct eth_header eth;
	struct ip_header ip = {};
	__u32 hash;
	__u16 length = skb->len + VXLAN_ROOM - sizeof(eth);

	/* Congestion is carried inside and must not be told twice (RFC 6040): the device knows how. */
	if (skb->gso_size || (tos & ECN_MASK) == ECN_CE)
		return 0;
	if (tunnel->device != flow->leaves)
		tunnel->device = flow->leaves;
	hash = bpf_get_hash_recalc(skb);
	ip.version_len = 0x45;
	ip.tos = tunnel->tos | (tos & ECN_MASK);
	ip.total_len = bpf_htons(length);
	ip.id = tunnel->fragment ? 0 : bpf_get_prandom_u32();
	ip.fragment = tunnel->fragment;
	ip.ttl = tunnel->ttl;
	ip.protocol = IPPROTO_UDP;
	ip.saddr = tunnel->saddr;
	ip.daddr = tunnel->daddr;
	ip.checksum = ip_checksum(&ip);
	vxlan.ip = ip;
	vxlan.sport = bpf_htons(VXLAN_PORT_MIN + (__u16)(((__u64)hash * VXLAN_PORT_COUNT) >> 32));
	vxlan.dport = tunnel->port;
	vxlan.length = bpf_htons(length - sizeof(ip));
	vxlan.flags = VXLAN_FLAGS;
	vxlan.vni = tunnel->vni;
	vxlan.inner.type = bpf_htons(ETH_P_IP);
	__builtin_memcpy(vxlan.inner.to, flow->to_mac, sizeof(flow->to_mac));
	__builtin_memcpy(vxlan.inner.from, flow->from_mac, sizeof(flow->from_mac));
	__builtin_memcpy(eth.to, tunnel->to_mac, sizeof(eth.to));
	__builtin_memcpy(eth.from, tunnel->from_mac, sizeof(eth.from));
	eth.type = bpf_htons(ETH_P_IP);
	if (bpf_skb_adjust_room(skb, VXLAN_ROOM, BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
					BPF_F_ADJ_ROOM_ENCAP_L2_ETH | BPF_F_ADJ_ROOM_ENCAP_L2(sizeof(eth))))
		return 0;
	if (bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0) ||
	    bpf_skb_store_bytes(skb, sizeof(eth), &vxlan, sizeof(vxlan), 0))
		return -1;
	return 1;
}
