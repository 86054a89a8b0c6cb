/* What the VMM and its guest agree on: where things lie, the boot information, the ports.  SPDX: MIT OR Apache-2.0 */
#ifndef GUEST_H
#define GUEST_H
#include <stdint.h>

enum {                                  /* guest physical addresses, all inside the first 2 MiB of ram.low */
    GUEST_GDT = 0x1000,
    GUEST_IDT = 0x2000,
    GUEST_PAGE_TABLES = 0x10000,        /* PML4, PDPT, one page directory per GiB */
    GUEST_BOOT_INFO = 0x80000,
    GUEST_INTERRUPTS = 0x81000,         /* per vCPU: interrupt stack, then the counts of PIT and APIC timer */
    GUEST_INTERRUPT_STRIDE = 256,
    GUEST_INTERRUPT_COUNTS = 192,       /* where the counts begin: the stack's end */
    GUEST_TSS = 0xa0000,                /* per vCPU: 104 bytes, then an I/O bitmap of zeros: ring 3 may use every port */
    GUEST_TSS_STRIDE = 0x3000,
    GUEST_IMAGE = 0x100000,
    GUEST_STACKS = 0x180000,            /* one per vCPU, growing down from the end of its slice */
    GUEST_STACK_SIZE = 0x4000,
    GUEST_FREE = 0x200000,              /* from here on RAM belongs to the vCPUs' working sets */
};
#define GUEST_HIGH_BASE 0x100000000ull  /* ram.high starts behind the PCI hole */
#define GUEST_PAGE 4096ull

enum { GUEST_MAX_VCPUS = 16 };

enum {
    PORT_HEARTBEAT = 0xe9,              /* out 8: I am alive */
    PORT_SERIAL = 0x3f8,                /* 8 ports of a 16550 */
    PORT_PROBE_WORD = 0x600,            /* out 32: push one word of a report */
    PORT_PROBE_COMMIT = 0x604,          /* out 32: the words pushed so far are a PROBE_* report */
    PORT_TICKER_PERIOD = 0x620,         /* out 32: tick every so many microseconds of guest time; 0 stops it */
    PORT_TICKER_COUNT = 0x624,          /* in 32: ticks so far */
    PORT_NAP = 0x630,                   /* out 32: give the CPU away for so many microseconds at most */
};

#define GUEST_APIC 0xfee00000ull        /* the local APIC's registers, in the PCI hole */
enum { VECTOR_PIT = 0x20, VECTOR_APIC_TIMER = 0x30, GUEST_VECTORS };

enum { PROBE_WORDS = 8 };
enum {                                  /* the words of each report, low half first */
    PROBE_GENERATION = 1,               /* generation, pages verified in it, ticker count, interrupts of PIT and APIC */
    PROBE_BAD_PAGE,                     /* address, expected, found: 64 bits each */
    PROBE_BAD_TSC,                      /* last value, 0, value read now */
    PROBE_BAD_TICKER,                   /* last count, 0, count read now */
    PROBE_BAD_VECTOR,                   /* register, value put there, value found */
};

struct boot_info {
    uint64_t low_end, high_end;         /* RAM is [GUEST_FREE, low_end) and [GUEST_HIGH_BASE, high_end) */
    uint64_t tick_tsc;                  /* TSC ticks between two heartbeats */
    uint32_t vcpus;
    uint32_t hot_pages;                 /* working set of the whole guest */
    uint32_t burst;                     /* pages the whole guest writes per heartbeat; 0: as fast as it can */
    uint32_t ticker_us;
    uint32_t spin;                      /* wait for the next heartbeat without giving the CPU away */
    uint32_t avx;                       /* the upper halves of the vector registers may be used */
    uint32_t stamped;                   /* pages carry the stamp of generation 0, else zeros */
};

/* What a page carries in its first and last word: which page it is and when it was written. */
static inline uint64_t guest_stamp(uint32_t generation, uint64_t address)
{
    return (uint64_t)generation << 32 | (uint32_t)(address / GUEST_PAGE);
}
#endif
