/* The guest: ring 3, long mode, flat memory, no operating system.                      SPDX: MIT OR Apache-2.0
 *
 * Each vCPU owns a slice of both RAM blocks and writes a stamp (generation, page number) over its working set again
 * and again. Before a page is overwritten it must still carry the stamp of the previous generation: a page that was
 * lost, mixed up or restored too old stops the guest. A page is stamped at both ends, so half a page is noticed too. */
#include "guest.h"

static inline void out8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint8_t in8(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline void out32(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %w1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint32_t in32(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %w1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline uint64_t rdtsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (uint64_t)high << 32 | low;
}

struct worker {
    const struct boot_info *boot;
    uint64_t low_first, high_first;     /* addresses of this vCPU's slices */
    uint32_t pages, burst, vcpu;
    uint32_t ticks;                     /* what the ticker said last */
    uint64_t now, next_beat;            /* TSC */
    uint64_t vector;                    /* what the vector registers hold */
};

static void report64(uint64_t value)
{
    out32(PORT_PROBE_WORD, (uint32_t)value);
    out32(PORT_PROBE_WORD, (uint32_t)(value >> 32));
}

static void fault(uint32_t kind, uint64_t where, uint64_t expected, uint64_t found)
{
    report64(where);
    report64(expected);
    report64(found);
    out32(PORT_PROBE_COMMIT, kind);
    for (;;)                            /* the VMM ends here; a second vCPU may get this far meanwhile */
        out32(PORT_NAP, 1000);
}

static void serial_put(char c)
{
    while (!(in8(PORT_SERIAL + 5) & 0x20))
        continue;
    out8(PORT_SERIAL, (uint8_t)c);
}

static void serial_text(const char *text)
{
    while (*text)
        serial_put(*text++);
}

static void serial_number(uint32_t value)
{
    if (value >= 10)
        serial_number(value / 10);
    serial_put((char)('0' + value % 10));
}

static void serial_start(const struct boot_info *boot)
{
    out8(PORT_SERIAL + 3, 0x80);        /* 115200 8N1, behind the divisor latch */
    out8(PORT_SERIAL + 0, 1);
    out8(PORT_SERIAL + 1, 0);
    out8(PORT_SERIAL + 3, 0x03);
    serial_text("guest: ");
    serial_number(boot->vcpus);
    serial_text(" vCPUs, working set ");
    serial_number(boot->hot_pages);
    serial_text(" pages\n");
}

/* The working set alternates between the two blocks, so that every pass writes both. */
static uint64_t page_address(const struct worker *w, uint32_t i)
{
    return (i & 1 ? w->high_first : w->low_first) + (uint64_t)(i / 2) * GUEST_PAGE;
}

static void read_tsc(struct worker *w)
{
    uint64_t now = rdtsc();
    if (now < w->now)
        fault(PROBE_BAD_TSC, w->now, 0, now);
    w->now = now;
}

static void read_ticker(struct worker *w)
{
    uint32_t ticks = in32(PORT_TICKER_COUNT);
    if (ticks < w->ticks)
        fault(PROBE_BAD_TICKER, w->ticks, 0, ticks);
    w->ticks = ticks;
}

/* The compiler leaves the vector registers alone, so what is put there stays there from one heartbeat to the next,
 * whatever host that is on: xmm3, the control word and, with AVX, the upper half of ymm12. */
static void put_vectors(struct worker *w, uint64_t value)
{
    uint64_t words[4] = { value, ~value, value * 3, value ^ 0x5555555555555555 };
    uint32_t control = 0x1f80 | ((uint32_t)value & 3) << 13;

    __asm__ volatile("movdqu %0, %%xmm3\n\tldmxcsr %1" : : "m"(words), "m"(control));
    if (w->boot->avx)
        __asm__ volatile("vmovdqu %0, %%ymm12" : : "m"(words));
    w->vector = value;
}

static void check_word(uint64_t which, uint64_t expected, uint64_t found)
{
    if (found != expected)
        fault(PROBE_BAD_VECTOR, which, expected, found);
}

static void check_vectors(const struct worker *w)
{
    uint64_t words[4] = { 0 }, value = w->vector;
    uint32_t control;

    __asm__ volatile("movdqu %%xmm3, %0\n\tstmxcsr %1" : "=m"(words), "=m"(control));
    check_word(3, value, words[0]);
    check_word(3, ~value, words[1]);
    check_word(100, (uint32_t)value & 3, control >> 13 & 3);
    if (!w->boot->avx)
        return;
    __asm__ volatile("vmovdqu %%ymm12, %0" : "=m"(words));
    check_word(12, value * 3, words[2]);
    check_word(12, value ^ 0x5555555555555555, words[3]);
}

static void heartbeat(struct worker *w)
{
    const uint64_t tick = w->boot->tick_tsc;

    read_tsc(w);
    while (w->burst && w->now < w->next_beat) {
        uint64_t left = w->next_beat - w->now;
        if (!w->boot->spin && left > tick / 4)      /* wake up early and spin for the rest */
            out32(PORT_NAP, (uint32_t)((left - tick / 8) * w->boot->ticker_us / tick));
        read_tsc(w);
    }
    if (w->now < w->next_beat)
        return;
    out8(PORT_HEARTBEAT, (uint8_t)w->vcpu);
    read_ticker(w);
    check_vectors(w);
    put_vectors(w, w->now);
    w->next_beat += tick;
    if (w->now - w->next_beat < UINT64_MAX / 2 && w->now - w->next_beat > 8 * tick)
        w->next_beat = w->now + tick;               /* far behind: do not catch up in one burst */
}

static void visit(uint64_t address, uint64_t expected, uint64_t next)
{
    volatile uint64_t *page = (volatile uint64_t *)address;
    uint64_t first = page[0], last = page[511];

    if (first != expected || last != expected)
        fault(PROBE_BAD_PAGE, address, expected, first != expected ? first : last);
    page[0] = next;
    page[511] = next;
}

/* ---- interrupts: the only code that runs in ring 0, so it is tiny ---- */

/* Both only count, right above their stack. The PIC ends its interrupts by itself, the APIC has to be told. */
__asm__(".text\n"
        ".globl interrupt_pit, interrupt_apic\n"
        "interrupt_pit:\n"
        "    incq 40(%rsp)\n"
        "    iretq\n"
        "interrupt_apic:\n"
        "    push %rax\n"
        "    xor %eax, %eax\n"
        "    movabs %eax, 0xfee000b0\n"
        "    incq 56(%rsp)\n"
        "    pop %rax\n"
        "    iretq\n");
extern const uint8_t interrupt_pit[], interrupt_apic[];

static void set_gate(uint32_t vector, const uint8_t *handler)
{
    enum { KERNEL_CODE = 0x8, INTERRUPT_GATE = 0x8e };
    volatile uint64_t *gate = (volatile uint64_t *)(uintptr_t)GUEST_IDT + 2 * vector;
    uint64_t at = (uint64_t)handler;

    gate[1] = at >> 32;
    gate[0] = (at & 0xffff) | KERNEL_CODE << 16 | (uint64_t)INTERRUPT_GATE << 40 | (at >> 16 & 0xffff) << 48;
}

static void apic_write(uint32_t reg, uint32_t value)
{
    *(volatile uint32_t *)(GUEST_APIC + reg) = value;
}

/* Some twenty interrupts a second each, few enough to cost nothing where ring 0 is emulated: of the PIT through PIC and LINT0 on vCPU 0, of the APIC's timer on all. */
static void start_interrupts(uint32_t vcpu)
{
    enum { PIT_COUNT = 0xffff, APIC_COUNT = 50000000 };

    set_gate(VECTOR_PIT, interrupt_pit);
    set_gate(VECTOR_APIC_TIMER, interrupt_apic);
    apic_write(0xf0, 0x1ff);            /* on */
    apic_write(0x350, vcpu ? 0x10000 : 0x700);      /* LINT0 takes the PIC's vectors */
    apic_write(0x3e0, 0xb);             /* not divided */
    apic_write(0x320, 0x20000 | VECTOR_APIC_TIMER); /* periodic */
    apic_write(0x380, APIC_COUNT);
    if (vcpu)
        return;
    out8(0x20, 0x11), out8(0x21, VECTOR_PIT), out8(0x21, 4), out8(0x21, 3), out8(0x21, 0xfe);
    out8(0xa0, 0x11), out8(0xa1, VECTOR_PIT + 8), out8(0xa1, 2), out8(0xa1, 1), out8(0xa1, 0xff);
    out8(0x43, 0x34), out8(0x40, PIT_COUNT & 0xff), out8(0x40, PIT_COUNT >> 8);
}

static uint32_t interrupts(uint32_t vcpu, uint32_t which)
{
    uint64_t counts = GUEST_INTERRUPTS + (uint64_t)vcpu * GUEST_INTERRUPT_STRIDE + GUEST_INTERRUPT_COUNTS;

    return (uint32_t)((volatile uint64_t *)counts)[which];
}

static void one_generation(struct worker *w, uint32_t generation)
{
    uint32_t batch = w->burst ? w->burst : 64, left = batch;

    for (uint32_t i = 0; i < w->pages; i++) {
        uint64_t address = page_address(w, i);
        uint64_t expected = generation > 1 || w->boot->stamped ? guest_stamp(generation - 1, address) : 0;
        visit(address, expected, guest_stamp(generation, address));
        if (--left == 0) {
            heartbeat(w);
            left = batch;
        }
    }
    out32(PORT_PROBE_WORD, generation);
    out32(PORT_PROBE_WORD, w->pages);
    out32(PORT_PROBE_WORD, w->ticks);
    out32(PORT_PROBE_WORD, interrupts(w->vcpu, 0));
    out32(PORT_PROBE_WORD, interrupts(w->vcpu, 1));
    out32(PORT_PROBE_COMMIT, PROBE_GENERATION);
}

static uint32_t at_least_one(uint32_t value)
{
    return value ? value : 1;
}

__attribute__((section(".text.start"), noreturn)) void guest_main(uint32_t vcpu)
{
    const struct boot_info *boot = (const struct boot_info *)(uintptr_t)GUEST_BOOT_INFO;
    uint64_t low = (boot->low_end - GUEST_FREE) / GUEST_PAGE / boot->vcpus;
    uint64_t high = (boot->high_end - GUEST_HIGH_BASE) / GUEST_PAGE / boot->vcpus;
    uint64_t most = 2 * (low < high ? low : high);
    struct worker w = { .boot = boot, .vcpu = vcpu };

    w.low_first = GUEST_FREE + vcpu * low * GUEST_PAGE;
    w.high_first = GUEST_HIGH_BASE + vcpu * high * GUEST_PAGE;
    w.pages = at_least_one(boot->hot_pages / boot->vcpus);
    if (w.pages > most)
        w.pages = (uint32_t)most;
    w.burst = boot->burst ? at_least_one(boot->burst / boot->vcpus) : 0;
    if (vcpu == 0) {
        serial_start(boot);
        out32(PORT_TICKER_PERIOD, boot->ticker_us);
    }
    start_interrupts(vcpu);
    read_tsc(&w);
    put_vectors(&w, w.now);
    w.next_beat = w.now + boot->tick_tsc;
    for (uint32_t generation = 1;; generation++) {
        one_generation(&w, generation);
        while (vcpu == 0 && in8(PORT_SERIAL + 5) & 1)   /* the console echoes, before and after a move */
            serial_put((char)in8(PORT_SERIAL));
    }
}
