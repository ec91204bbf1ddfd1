/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
 *
 * NetworkPolicy: one object of all programs, because they share their maps. Each hook has a file.
 */
#include "include/verdict.h"

#include "from_pod.bpf.c"
#include "to_pod.bpf.c"
#include "to_wire.bpf.c"
#include "fast_path.bpf.c"

/* The kernel lends most helpers to GPL-compatible programs only. */
char _license[] SEC("license") = "Dual BSD/GPL";
