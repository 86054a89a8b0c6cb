/* The guest that checks the interpreter: instruction by instruction, against the manual.  SPDX: MIT OR Apache-2.0
 *
 * Says "bad WHAT ..." for what is wrong, "arithmetic HASH" over many results of compiled code for whoever computes the same
 * elsewhere, and in the end "checks N bad N". Waits once for two characters to be typed, after it said "type". */
#include "guest.h"

static uint32_t checks, bad;
static uint8_t bytes[64] __attribute__((aligned(64)));

static void check(const char *what, uint32_t found, uint32_t expected)
{
    checks++;
    if (found == expected)
        return;
    bad++;
    put_text("bad "), put_text(what), put_text(" is "), put_hex(found), put_text(", must be "), put_hex(expected), put('\n');
}

/* ---- traps: each is recorded, and goes on behind the instruction ---- */

static volatile uint32_t traps, cause, epc, value, resume_at, status_inside;
static volatile uint32_t interrupts[12], first_interrupt;

uint32_t guest_trap(uint32_t trap_cause, uint32_t trap_epc, uint32_t trap_value)
{
    uint32_t next = resume_at ? resume_at : trap_epc + 4;

    status_inside = csr_get(mstatus);
    traps++, cause = trap_cause, epc = trap_epc, value = trap_value, resume_at = 0;
    if (!(trap_cause & INTERRUPT))
        return next;
    if (!first_interrupt)
        first_interrupt = trap_cause & 31;
    interrupts[trap_cause & 15]++;
    switch (trap_cause & 31) {
    case 3: MSIP = 0; break;
    case 7: set_alarm(UINT64_MAX); break;
    default: csr_clear(mie, IRQ_EXTERNAL);
    }
    return trap_epc;
}

static void trapped(const char *what, uint32_t with_cause, uint32_t with_value)
{
    check(what, traps, 1);
    check(what, cause, with_cause);
    check(what, value, with_value);
    traps = 0, cause = 99, value = 0x12345678;
}

/* Runs one instruction and checks that the trap names its address. */
#define TRAPS(what, with_cause, with_value, instruction, ...) \
    ({ \
        uint32_t at_; \
        __asm__ volatile("la %0, 1f\n1: " instruction : "=&r"(at_) : __VA_ARGS__ : "memory", "t0"); \
        check(what " epc", epc, at_); \
        trapped(what, with_cause, with_value); \
    })

static void check_traps(void)
{
    uint32_t at = (uint32_t)(uintptr_t)bytes;

    TRAPS("ecall", 11, 0, "ecall", "r"(0));
    TRAPS("ebreak", 3, epc, "ebreak", "r"(0));
    TRAPS("illegal zeros", 2, 0, ".word 0", "r"(0));
    TRAPS("illegal ones", 2, UINT32_MAX, ".word 0xffffffff", "r"(0));
    TRAPS("illegal funct7", 2, 0x42000033, ".word 0x42000033", "r"(0));
    TRAPS("illegal slli", 2, 0x42001013, ".word 0x42001013", "r"(0));
    TRAPS("illegal srai of 33", 2, 0x42005013, ".word 0x42005013", "r"(0));
    TRAPS("illegal sub of and", 2, 0x40007033, ".word 0x40007033", "r"(0));
    TRAPS("illegal load", 2, 0x00003003, ".word 0x00003003", "r"(0));
    TRAPS("illegal store", 2, 0x00003023, ".word 0x00003023", "r"(0));
    TRAPS("illegal branch", 2, 0x00002063, ".word 0x00002063", "r"(0));
    TRAPS("illegal jalr", 2, 0x00001067, ".word 0x00001067", "r"(0));
    TRAPS("lh misaligned", 4, at + 1, "lh t0, 1(%1)", "r"(at));
    TRAPS("lhu misaligned", 4, at + 3, "lhu t0, 3(%1)", "r"(at));
    TRAPS("lw misaligned", 4, at + 2, "lw t0, 2(%1)", "r"(at));
    TRAPS("sh misaligned", 6, at + 1, "sh t0, 1(%1)", "r"(at));
    TRAPS("sw misaligned", 6, at + 3, "sw t0, 3(%1)", "r"(at));
    TRAPS("load from nowhere", 5, 0x40000000, "lw t0, 0(%1)", "r"(0x40000000));
    TRAPS("store to nowhere", 7, 0x40000004, "sw t0, 4(%1)", "r"(0x40000000));
    TRAPS("load below RAM", 5, 0x7ffffffc, "lw t0, -4(%1)", "r"(0x80000000));
    TRAPS("a byte of the timer", 5, 0x0200bff8, "lb t0, 0(%1)", "r"(0x0200bff8));
    TRAPS("a word of the console", 7, 0x10000000, "sw t0, 0(%1)", "r"(0x10000000));
    TRAPS("no such csr", 2, 0x7c001073, "csrw 0x7c0, zero", "r"(0));
}

/* What cannot be fetched traps where it should have been: no way back but the one that was told. */
static void check_jumps(void)
{
    uint32_t t;

    __asm__ volatile("la %0, 1f\n sw %0, 0(%1)\n jr %2\n1:" : "=&r"(t) : "r"(&resume_at), "r"(0x40000000) : "memory");
    check("fetch epc", epc, 0x40000000);
    trapped("fetch from nowhere", 1, 0x40000000);
    __asm__ volatile("la %0, 1f\n1: jalr t0, 2(%0)" : "=&r"(t) : : "memory", "t0");
    check("misaligned jump epc", epc, t);
    trapped("misaligned jump", 0, t + 2);
    __asm__ volatile("la %0, 1f\n j 2f\n 1: li %0, 7\n j 3f\n 2: jalr zero, 1(%0)\n 3:" : "=&r"(t) : : "memory");
    check("jalr drops bit 0", t, 7);
    __asm__ volatile("la %0, 1f\n mv t0, %0\n jalr t0, 0(t0)\n li t0, 0\n 1: sub %0, %0, t0" : "=&r"(t) : : "t0");
    check("jalr to and from one register", t, 4);
}

/* ---- single instructions, where compiled code does not get ---- */

#define OP(name, a, b, expected) \
    ({ \
        uint32_t result_; \
        __asm__ volatile(name " %0, %1, %2" : "=r"(result_) : "r"((uint32_t)(a)), "r"((uint32_t)(b))); \
        check(name " " #a " " #b, result_, (uint32_t)(expected)); \
    })

#define LEAST 0x80000000u
#define MOST 0x7fffffffu

static void check_operations(void)
{
    OP("div", 7, 0, -1), OP("divu", 7, 0, -1), OP("rem", 7, 0, 7), OP("remu", 7, 0, 7);
    OP("div", LEAST, -1, LEAST), OP("rem", LEAST, -1, 0), OP("rem", -7, 0, -7), OP("div", 0, 0, -1);
    OP("div", -7, 2, -3), OP("rem", -7, 2, -1), OP("rem", 7, -2, 1), OP("divu", -7, 2, 0x7ffffffc), OP("remu", -7, 10, 9);
    OP("mul", LEAST, LEAST, 0), OP("mulh", LEAST, LEAST, 0x40000000), OP("mulhu", LEAST, LEAST, 0x40000000);
    OP("mulhsu", LEAST, LEAST, 0xc0000000), OP("mulhsu", -1, -1, -1), OP("mulhu", -1, -1, -2), OP("mulh", -1, -1, 0);
    OP("mulh", -1, 1, -1), OP("mulhsu", 1, -1, 0), OP("mulhsu", -1, 1, -1), OP("mulh", MOST, MOST, 0x3fffffff);
    OP("sll", 1, 33, 2), OP("srl", LEAST, 63, 1), OP("sra", LEAST, 63, -1), OP("sra", LEAST, 32, LEAST);
    OP("sra", MOST, 30, 1), OP("sll", -1, 31, LEAST), OP("srl", -1, 0, -1);
    OP("slt", LEAST, MOST, 1), OP("sltu", LEAST, MOST, 0), OP("slt", MOST, LEAST, 0), OP("sltu", 0, -1, 1), OP("slt", 5, 5, 0);
    OP("add", MOST, 1, LEAST), OP("sub", 0, 1, -1), OP("sub", LEAST, 1, MOST);
    OP("xor", 0xff00ff00, 0x0ff00ff0, 0xf0f0f0f0), OP("or", 0xff00, 0xff, 0xffff), OP("and", 0xff0, 0xff, 0xf0);
}

#define OP_IMMEDIATE(text, a, expected) \
    ({ \
        uint32_t result_; \
        __asm__ volatile(text : "=r"(result_) : "r"((uint32_t)(a))); \
        check(text, result_, (uint32_t)(expected)); \
    })

static void check_immediates(void)
{
    OP_IMMEDIATE("addi %0, %1, -2048", 0, -2048);
    OP_IMMEDIATE("addi %0, %1, 2047", 1, 2048);
    OP_IMMEDIATE("slti %0, %1, -1", -2, 1);
    OP_IMMEDIATE("slti %0, %1, -1", 0, 0);
    OP_IMMEDIATE("sltiu %0, %1, -1", 5, 1);
    OP_IMMEDIATE("sltiu %0, %1, 1", 0, 1);
    OP_IMMEDIATE("xori %0, %1, -1", 0x12345678, 0xedcba987);
    OP_IMMEDIATE("ori %0, %1, -16", 5, -11);
    OP_IMMEDIATE("andi %0, %1, -16", 0xabcdef, 0xabcde0);
    OP_IMMEDIATE("slli %0, %1, 31", 3, LEAST);
    OP_IMMEDIATE("srli %0, %1, 31", LEAST, 1);
    OP_IMMEDIATE("srai %0, %1, 31", LEAST, -1);
    OP_IMMEDIATE("srai %0, %1, 4", MOST, 0x07ffffff);
    OP_IMMEDIATE("lui %0, 0xfffff # %1", 0, 0xfffff000);
    OP_IMMEDIATE("auipc %0, 1\n auipc t0, 0\n sub %0, %0, t0 # %1", 0, 0x1000 - 4);
    OP_IMMEDIATE("addi zero, %1, 1\n mv %0, zero", 41, 0);
    OP_IMMEDIATE("csrrs zero, mscratch, zero\n mv %0, zero # %1", 0, 0);
}

#define TAKEN(name, a, b, expected) \
    ({ \
        uint32_t result_; \
        __asm__ volatile("li %0, 1\n " name " %1, %2, 1f\n li %0, 0\n 1:" : "=&r"(result_) : "r"((uint32_t)(a)), \
                         "r"((uint32_t)(b))); \
        check(name " " #a " " #b, result_, expected); \
    })

static void check_branches(void)
{
    TAKEN("beq", 5, 5, 1), TAKEN("beq", 5, 6, 0), TAKEN("bne", 5, 5, 0), TAKEN("bne", 5, 6, 1);
    TAKEN("blt", -1, 0, 1), TAKEN("blt", 0, -1, 0), TAKEN("blt", 3, 3, 0), TAKEN("bge", -1, 0, 0), TAKEN("bge", 3, 3, 1);
    TAKEN("bltu", -1, 0, 0), TAKEN("bltu", 0, -1, 1), TAKEN("bgeu", -1, 0, 1), TAKEN("bgeu", 0, -1, 0), TAKEN("bgeu", 2, 2, 1);
}

static void check_memory(void)
{
    volatile uint32_t *word = (volatile uint32_t *)bytes;
    volatile uint16_t *half = (volatile uint16_t *)bytes;
    volatile uint8_t *byte = bytes;

    word[0] = 0x80c1f27f;
    check("lb", (uint32_t)*(volatile int8_t *)(bytes + 1), 0xfffffff2);
    check("lbu", byte[1], 0xf2);
    check("lb of a positive", (uint32_t)*(volatile int8_t *)bytes, 0x7f);
    check("lh", (uint32_t)*(volatile int16_t *)(bytes + 2), 0xffff80c1);
    check("lhu", half[1], 0x80c1);
    byte[2] = 0x55;
    check("sb", word[0], 0x8055f27f);
    half[0] = 0x1234;
    check("sh", word[0], 0x80551234);
    /* Offsets reach both ways. */
    uint32_t far;
    __asm__ volatile("sw %1, -2048(%2)\n lw %0, 2047(%3)" : "=r"(far) : "r"(0xabcd), "r"(bytes + 2048), "r"(bytes - 2047)
                     : "memory");
    check("far offsets", far, 0xabcd);
}

/* A program that writes itself: li a0, 42; ret. */
static void check_written_code(void)
{
    volatile uint32_t *code = (volatile uint32_t *)(uintptr_t)GUEST_FREE;
    uint32_t (*call)(void) = (uint32_t(*)(void))(uintptr_t)GUEST_FREE;

    code[0] = 0x02a00513, code[1] = 0x00008067;
    __asm__ volatile("fence.i" : : : "memory");
    check("written code", call(), 42);
    code[0] = 0x02b00513;
    __asm__ volatile("fence.i\n fence" : : : "memory");
    check("rewritten code", call(), 43);
}

/* ---- control and status registers ---- */

static void check_csrs(void)
{
    uint32_t old, low, high;

    csr_put(mscratch, 0xf0f0);
    __asm__ volatile("csrrw %0, mscratch, %1" : "=r"(old) : "r"(0x1234));
    check("csrrw old", old, 0xf0f0);
    __asm__ volatile("csrrs %0, mscratch, %1" : "=r"(old) : "r"(0x4321));
    check("csrrs old", old, 0x1234);
    __asm__ volatile("csrrc %0, mscratch, %1" : "=r"(old) : "r"(0x0f));
    check("csrrc old", old, 0x5335);
    __asm__ volatile("csrrsi %0, mscratch, 31" : "=r"(old));
    check("csrrsi old", old, 0x5330);
    __asm__ volatile("csrrci %0, mscratch, 1" : "=r"(old));
    check("csrrci old", old, 0x533f);
    __asm__ volatile("csrrwi %0, mscratch, 9" : "=r"(old));
    check("csrrwi old", old, 0x533e);
    check("csrrwi new", csr_get(mscratch), 9);
    check("misa", csr_get(misa), 0x40001100);
    check("mhartid", csr_get(mhartid), 0);
    TRAPS("write to mhartid", 2, 0xf1401073, "csrw mhartid, zero", "r"(0));
    TRAPS("write to cycle", 2, 0xc0001073, "csrw cycle, zero", "r"(0));
    check("mhartid by csrrs", csr_get(mhartid), 0);
    csr_put(mtvec, 0x80000107), check("mtvec has two modes", csr_get(mtvec), 0x80000105);
    csr_put(mtvec, (uint32_t)(uintptr_t)({ extern const char trap_direct[]; trap_direct; }));
    csr_put(mepc, 0x80000107), check("mepc is aligned", csr_get(mepc), 0x80000104);
    csr_put(mie, -1), check("mie", csr_get(mie), 0x888);
    csr_put(mie, 0);
    csr_put(mip, -1), check("mip cannot be written", csr_get(mip), 0);
    csr_put(mstatus, 0), check("mstatus", csr_get(mstatus), 0x1800);
    csr_put(mstatus, -1 & ~MSTATUS_MIE), check("mstatus.mpie", csr_get(mstatus), 0x1880);
    csr_put(mstatus, 0x1880);           /* a trap where interrupts are off, and were on before */
    __asm__ volatile("ecall" : : : "memory");
    check("off inside, and were off", status_inside, 0x1800);
    check("off again", csr_get(mstatus), 0x1880);
    csr_put(mcause, 0x8000000b), check("mcause", csr_get(mcause), 0x8000000b);
    csr_put(mtval, 77), check("mtval", csr_get(mtval), 77);
    __asm__ volatile("csrr %0, minstret\n nop\n nop\n csrr %1, minstret" : "=r"(low), "=r"(high));
    check("minstret counts", high - low, 3);
    __asm__ volatile("csrw minstret, %1\n csrr %0, minstret" : "=r"(low) : "r"(500));
    check("minstret is written", low, 500);
    __asm__ volatile("csrw mcycleh, zero\n csrw mcycle, %2\n nop\n nop\n csrr %0, mcycleh\n csrr %1, mcycle"
                     : "=&r"(high), "=&r"(low) : "r"(-2));
    check("mcycle carries", high, 1);
    check("mcycle counts on", low, 1);
    __asm__ volatile("csrr %0, minstret\n ecall\n csrr %1, minstret" : "=r"(low), "=r"(high));
    check("ecall", cause, 11);
    traps = 0;
}

/* ---- interrupts ---- */

static void forget(void)
{
    for (int i = 0; i < 12; i++)
        interrupts[i] = 0;
    first_interrupt = traps = 0;
}

static void check_interrupts(void)
{
    csr_clear(mstatus, MSTATUS_MIE);
    csr_put(mie, IRQ_SOFTWARE | IRQ_TIMER);
    forget();
    MSIP = 1;
    check("pending", csr_get(mip), IRQ_SOFTWARE);
    check("not taken where they are off", traps, 0);
    wait_for_interrupt();               /* ends all the same */
    check("not taken after wfi", traps, 0);
    csr_set(mstatus, MSTATUS_MIE);
    check("taken at once", interrupts[3], 1);
    check("off inside, and remembered", status_inside, 0x1880);
    check("on again", csr_get(mstatus), 0x1888);
    check("epc of wfi", MSIP, 0);
    csr_put(mie, 0);
    MSIP = 1;
    check("not taken when masked", interrupts[3], 1);
    MSIP = 0;

    forget();                           /* both at once: software first */
    csr_clear(mstatus, MSTATUS_MIE);
    csr_put(mie, IRQ_SOFTWARE | IRQ_TIMER);
    set_alarm(0);
    MSIP = 1;
    check("both pending", csr_get(mip), IRQ_SOFTWARE | IRQ_TIMER);
    csr_set(mstatus, MSTATUS_MIE);
    check("the first", first_interrupt, 3);
    check("both taken", interrupts[3] + interrupts[7], 2);

    forget();                           /* in time, out of wfi and out of a loop */
    uint64_t begin = time_now();
    set_alarm(begin + 30000);
    while (!interrupts[7])
        wait_for_interrupt();
    check("not too early", time_now() >= begin + 30000, 1);
    forget();
    set_alarm(time_now() + 20000);
    while (!interrupts[7])
        continue;
    check("time goes on", time_now() > begin + 50000, 1);
    MTIME_HIGH = 5, MTIME_LOW = 1000000;
    check("mtime is written", MTIME_HIGH, 5);
    check("the csr of it", csr_get(timeh), 5);
}

/* Vectored: each cause has a jump of its own. */
__asm__("        .text\n"
        "        .align 6\n"
        "vectors: j trap_direct\n j never\n j never\n j software\n j never\n j never\n j never\n j trap_direct\n"
        "        j never\n j never\n j never\n j trap_direct\n"
        "never:  li a0, 0x100000\n li a1, 0x93333\n sw a1, 0(a0)\n"
        "software: csrw mscratch, ra\n addi sp, sp, -16\n sw t0, 0(sp)\n sw t1, 4(sp)\n"
        "        li t0, 0x02000000\n sw zero, 0(t0)\n la t0, vectored\n lw t1, 0(t0)\n addi t1, t1, 1\n sw t1, 0(t0)\n"
        "        lw t0, 0(sp)\n lw t1, 4(sp)\n addi sp, sp, 16\n csrr ra, mscratch\n mret\n");
uint32_t vectored;
extern const char vectors[], trap_direct[];

static void check_vectors(void)
{
    forget();
    csr_put(mtvec, (uint32_t)(uintptr_t)vectors | 1);
    csr_put(mie, IRQ_SOFTWARE | IRQ_TIMER);
    csr_set(mstatus, MSTATUS_MIE);
    MSIP = 1;
    check("vectored software interrupt", *(volatile uint32_t *)&vectored, 1);
    check("by its own vector", traps, 0);
    set_alarm(0);
    check("vectored timer", interrupts[7], 1);
    forget();
    TRAPS("exceptions go to the first vector", 3, epc, "ebreak", "r"(0));
    csr_put(mtvec, (uint32_t)(uintptr_t)trap_direct);
}

static void check_console(void)
{
    UART[7] = 0xa5, check("scratch", UART[7], 0xa5);
    UART[3] = 0x83, UART[0] = 1, UART[1] = 2;
    check("divisor", UART[0] | (uint32_t)UART[1] << 8, 0x201);
    UART[3] = 0x03;
    check("nothing typed", UART[5], 0x60);
    forget();
    UART[1] = 1;
    csr_put(mie, IRQ_EXTERNAL);
    csr_set(mstatus, MSTATUS_MIE);
    put_text("type\n");
    while (!interrupts[11])
        wait_for_interrupt();
    check("why", UART[2], 0x04);
    UART[1] = 0;
    check("no interrupt that was not asked for", csr_get(mip), 0);
    UART[1] = 1;
    check("pending again", csr_get(mip), IRQ_EXTERNAL);
    while (!(UART[5] & 1))
        continue;
    check("the first typed", UART[0], 'x');
    while (!(UART[5] & 1))
        continue;
    check("the second typed", UART[0], 'y');
    check("both taken", UART[2], 0x01);
    check("no more pending", csr_get(mip) & IRQ_EXTERNAL, 0);
    csr_clear(mstatus, MSTATUS_MIE);
}

/* ---- compiled code, compared with the same computed elsewhere ---- */

static uint32_t mix(uint32_t hash, uint32_t result)
{
    return (hash ^ result) * 0x01000193u;
}

static uint32_t random(uint32_t *state)
{
    *state ^= *state << 13, *state ^= *state >> 17, *state ^= *state << 5;
    return *state;
}

static uint32_t compiled_arithmetic(void)
{
    uint32_t hash = 0x811c9dc5, state = 1;

    for (int i = 0; i < 3000; i++) {
        uint32_t a = random(&state), b = random(&state) >> (i % 32);
        int32_t sa = (int32_t)a, divisor = (int32_t)(b | 1) == -1 ? 3 : (int32_t)(b | 1);
        uint64_t wide = (uint64_t)a << 32 | b;

        hash = mix(hash, a + b), hash = mix(hash, a - b), hash = mix(hash, a * b);
        hash = mix(hash, (uint32_t)((int64_t)sa * (int32_t)b >> 32)), hash = mix(hash, (uint32_t)((uint64_t)a * b >> 32));
        hash = mix(hash, (uint32_t)(sa / divisor)), hash = mix(hash, (uint32_t)(sa % divisor));
        hash = mix(hash, a / (b | 1)), hash = mix(hash, a % (b | 1));
        hash = mix(hash, a << (b & 31)), hash = mix(hash, a >> (b & 31)), hash = mix(hash, (uint32_t)(sa >> (b & 31)));
        hash = mix(hash, sa < (int32_t)b), hash = mix(hash, a < b), hash = mix(hash, (a & b) ^ (a | ~b));
        wide = wide * 0x5851f42d4c957f2d + a;
        hash = mix(hash, (uint32_t)wide), hash = mix(hash, (uint32_t)(wide >> 32));
        hash = mix(hash, (uint32_t)(wide >> (b & 63))), hash = mix(hash, (uint32_t)((int64_t)wide >> (a & 63)));
    }
    return hash;
}

void guest_main(uint32_t hart, uint32_t ram_bytes)
{
    check("the hart", hart, 0);
    TRAPS("the first word behind RAM", 5, 0x80000000 + ram_bytes, "lw t0, 0(%1)", "r"(0x80000000 + ram_bytes));
    check("the last word of RAM", *(volatile uint32_t *)(0x7ffffffc + ram_bytes), 0);
    check_traps();
    check_jumps();
    check_operations();
    check_immediates();
    check_branches();
    check_memory();
    check_written_code();
    check_csrs();
    check_interrupts();
    check_vectors();
    check_console();
    put_text("arithmetic "), put_hex(compiled_arithmetic()), put('\n');
    put_text("checks "), put_number(checks), put_text(" bad "), put_number(bad), put('\n');
    power_off(bad ? 1 : 0);
}
