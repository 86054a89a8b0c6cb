/* The guest that is moved about: walks over all of its memory, and knows what every word must hold. SPDX: MIT OR Apache-2.0
 *
 * In each pass every word of every page must be what the pass before wrote there, and is overwritten. A page that was
 * lost, mixed up or restored too old ends the machine, with words. A line a tick, "COUNTER PASS", goes to the console;
 * ticks come by the timer's interrupt. What is typed is echoed ("echo C"), by interrupt, too; `q` switches off. */
#include "guest.h"

enum { PAGE_WORDS = 1024, TICKS = 100000 /* 10 ms */, TYPED = 16, SCRATCH = 0x5c7a7c4 };

static volatile uint32_t ticks, typed_in;
static volatile char typed[TYPED];
static uint32_t printed, typed_out, pass;
static uint64_t alarm, last_time, last_retired;

static _Noreturn void wrong(const char *what, uint32_t where, uint32_t expected, uint32_t found)
{
    csr_clear(mstatus, MSTATUS_MIE);
    put_text("\nguest: "), put_text(what), put_text(" at "), put_hex(where), put_text(" is "), put_hex(found);
    put_text(", must be "), put_hex(expected), put_text(", pass "), put_number(pass), put('\n');
    power_off(2);
}

/* How many ticks there were is in memory and in a register of the CPU; a move must not part them. */
static uint32_t scratch_of(uint32_t count)
{
    return SCRATCH ^ count;
}

uint32_t guest_trap(uint32_t cause, uint32_t epc, uint32_t value)
{
    switch (cause) {
    case INTERRUPT | 7:
        csr_put(mscratch, scratch_of(++ticks));
        set_alarm(alarm += TICKS);
        return epc;
    case INTERRUPT | 11:
        while (UART[5] & 1)
            typed[typed_in++ % TYPED] = (char)UART[0];
        return epc;
    default: wrong("a trap", epc, value, cause);
    }
}

/* Neither the timer nor the count of instructions ever goes back, wherever the guest is. */
static void look_at_cpu(void)
{
    uint64_t now = time_now();
    uint32_t high, low;

    do
        high = csr_get(minstreth), low = csr_get(minstret);
    while (high != csr_get(minstreth));
    uint64_t retired = (uint64_t)high << 32 | low;
    if (now < last_time)
        wrong("mtime", 0, (uint32_t)last_time, (uint32_t)now);
    if (retired < last_retired)
        wrong("minstret", 0, (uint32_t)last_retired, (uint32_t)retired);
    csr_clear(mstatus, MSTATUS_MIE);
    if (csr_get(mscratch) != scratch_of(ticks))
        wrong("mscratch", 0, scratch_of(ticks), csr_get(mscratch));
    csr_set(mstatus, MSTATUS_MIE);
    last_time = now, last_retired = retired;
}

static void talk(void)
{
    while (printed != ticks) {
        put_number(++printed), put(' '), put_number(pass), put('\n');
        look_at_cpu();
    }
    while (typed_out != typed_in) {
        char c = typed[typed_out++ % TYPED];
        put_text("echo "), put(c), put('\n');
        if (c == 'q')
            power_off(0);
    }
}

/* Different in each word and each pass, and cheap: what takes time here is not what is tested. */
static uint32_t pass_mark(uint32_t number)
{
    return number * 0x9e3779b9u;
}

static void visit(uint32_t *page)
{
    uint32_t place = (uint32_t)(uintptr_t)page * 0x85ebca6bu;
    uint32_t before = pass_mark(pass - 1), after = pass_mark(pass);

    for (uint32_t i = 0; i < PAGE_WORDS; i++, place += 0x85ebca6bu) {
        uint32_t expected = pass > 1 ? before ^ place : 0;
        if (page[i] != expected)
            wrong("memory", (uint32_t)(uintptr_t)&page[i], expected, page[i]);
        page[i] = after ^ place;
    }
}

void guest_main(uint32_t hart, uint32_t ram_bytes)
{
    uint32_t pages = (ram_bytes - (GUEST_FREE - 0x80000000u)) / 4096;

    (void)hart;
    csr_put(mscratch, scratch_of(0));
    UART[1] = 1;
    set_alarm(alarm = time_now() + TICKS);
    csr_set(mie, IRQ_TIMER | IRQ_EXTERNAL);
    csr_set(mstatus, MSTATUS_MIE);
    for (pass = 1;; pass++) {
        for (uint32_t i = 0; i < pages; i++) {
            visit((uint32_t *)(uintptr_t)GUEST_FREE + i * PAGE_WORDS);
            talk();
        }
    }
}
