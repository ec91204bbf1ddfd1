/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * Services at connect time: one object of the socket programs, because they share their maps.
 */
#include "include/services.h"

#include "sock.bpf.c"

/* The kernel lends most helpers to GPL-compatible programs only. */
char _license[] SEC("license") = "Dual BSD/GPL";
