/* RV32IM with Zicsr, machine mode only, one instruction at a time.                      SPDX: MIT OR Apache-2.0
 *
 * From The RISC-V Instruction Set Manual, volumes I and II. Misaligned accesses trap, which the manual allows. */
#include "emulator.h"
#include <endian.h>
#include <string.h>

enum { LOAD = 0x03, FENCE = 0x0f, OP_IMM = 0x13, AUIPC = 0x17, STORE = 0x23, OP = 0x33, LUI = 0x37, BRANCH = 0x63, JALR = 0x67,
       JAL = 0x6f, SYSTEM = 0x73 };

/* What goes to mcause. */
enum { FETCH_MISALIGNED = 0, FETCH_FAULT = 1, ILLEGAL = 2, BREAKPOINT = 3, LOAD_MISALIGNED = 4, LOAD_FAULT = 5,
       STORE_MISALIGNED = 6, STORE_FAULT = 7, ENVIRONMENT_CALL = 11 };
#define INTERRUPT 0x80000000u

#define MSTATUS_MIE (1u << 3)
#define MSTATUS_MPIE (1u << 7)
#define MSTATUS_MPP (3u << 11)                  /* the previous mode is always M */
#define MISA (1u << 30 | 1u << 8 | 1u << 12)    /* 32 bits, I, M */

/* ---- traps ---- */

static void enter(struct cpu *cpu, uint32_t cause, uint32_t value)
{
    cpu->epc = cpu->pc;
    cpu->cause = cause;
    cpu->value = value;
    cpu->interrupts_were_on = cpu->interrupts_on;
    cpu->interrupts_on = false;
    cpu->pc = cpu->vector & ~3u;
    if (cause & INTERRUPT && cpu->vector & 1)
        cpu->pc += 4 * (cause & ~INTERRUPT);
}

static bool trap(struct cpu *cpu, uint32_t cause, uint32_t value)       /* false: the instruction did not happen */
{
    enter(cpu, cause, value);
    return false;
}

static void interrupt(struct cpu *cpu)
{
    uint32_t due = cpu->pending & cpu->enabled;

    if (due & IRQ_EXTERNAL)
        enter(cpu, INTERRUPT | 11, 0);
    else if (due & IRQ_SOFTWARE)
        enter(cpu, INTERRUPT | 3, 0);
    else if (due & IRQ_TIMER)
        enter(cpu, INTERRUPT | 7, 0);
}

/* ---- control and status registers ---- */

static bool csr_read(struct machine *vm, uint32_t number, uint32_t *value)
{
    struct cpu *cpu = &vm->cpu;
    uint64_t ticks;

    switch (number) {
    case 0x300:
        *value = MSTATUS_MPP | (cpu->interrupts_on ? MSTATUS_MIE : 0) | (cpu->interrupts_were_on ? MSTATUS_MPIE : 0);
        return true;
    case 0x301: *value = MISA; return true;
    case 0x304: *value = cpu->enabled; return true;
    case 0x305: *value = cpu->vector; return true;
    case 0x340: *value = cpu->scratch; return true;
    case 0x341: *value = cpu->epc; return true;
    case 0x342: *value = cpu->cause; return true;
    case 0x343: *value = cpu->value; return true;
    case 0x344: *value = cpu->pending; return true;
    case 0xb00: case 0xc00: *value = (uint32_t)cpu->cycles; return true;
    case 0xb80: case 0xc80: *value = (uint32_t)(cpu->cycles >> 32); return true;
    case 0xb02: case 0xc02: *value = (uint32_t)cpu->retired; return true;
    case 0xb82: case 0xc82: *value = (uint32_t)(cpu->retired >> 32); return true;
    case 0xc01: case 0xc81:
        ticks = machine_ticks(vm);
        *value = (uint32_t)(number == 0xc01 ? ticks : ticks >> 32);
        return true;
    case 0x310: case 0xf11: case 0xf12: case 0xf13: case 0xf14: case 0xf15:     /* mstatush, who we are: zero */
        *value = 0;
        return true;
    default: return false;
    }
}

/* The next instruction is to read what was written, so what this one will count is taken off by who calls. */
static void set_half(uint64_t *counter, bool high, uint32_t value)
{
    *counter = high ? (*counter & UINT32_MAX) | (uint64_t)value << 32 : (*counter & ~(uint64_t)UINT32_MAX) | value;
}

static bool csr_write(struct machine *vm, uint32_t number, uint32_t value)
{
    struct cpu *cpu = &vm->cpu;

    switch (number) {
    case 0x300:
        cpu->interrupts_on = value & MSTATUS_MIE;
        cpu->interrupts_were_on = value & MSTATUS_MPIE;
        return true;
    case 0x304: cpu->enabled = value & (IRQ_SOFTWARE | IRQ_TIMER | IRQ_EXTERNAL); return true;
    case 0x305: cpu->vector = value & ~2u; return true;
    case 0x340: cpu->scratch = value; return true;
    case 0x341: cpu->epc = value & ~3u; return true;
    case 0x342: cpu->cause = value; return true;
    case 0x343: cpu->value = value; return true;
    case 0xb00: case 0xb80: set_half(&cpu->cycles, number & 0x80, value), cpu->cycles--; return true;
    case 0xb02: case 0xb82: set_half(&cpu->retired, number & 0x80, value), cpu->retired--; return true;
    case 0x301: case 0x310: case 0x344: return true;    /* nothing in them can be changed by writing */
    default: return false;                      /* also for those that can be read only */
    }
}

/* CSRRW, CSRRS, CSRRC, and the same with a small number in place of a register. */
static bool csr_instruction(struct machine *vm, uint32_t insn)
{
    struct cpu *cpu = &vm->cpu;
    uint32_t number = insn >> 20, kind = insn >> 12 & 3, source = insn >> 15 & 31, old = 0, value;
    uint32_t operand = insn >> 14 & 1 ? source : cpu->x[source];
    bool writes = kind == 1 || source != 0;     /* setting or clearing no bit is no write, even of what is read-only */

    if (kind == 0 || !csr_read(vm, number, &old))
        return trap(cpu, ILLEGAL, insn);
    value = kind == 1 ? operand : kind == 2 ? old | operand : old & ~operand;
    if (writes && !csr_write(vm, number, value))
        return trap(cpu, ILLEGAL, insn);
    cpu->x[insn >> 7 & 31] = old;
    return true;
}

static bool system_instruction(struct machine *vm, uint32_t insn, uint32_t *next)
{
    struct cpu *cpu = &vm->cpu;

    switch (insn) {
    case 0x00000073: return trap(cpu, ENVIRONMENT_CALL, 0);
    case 0x00100073: return trap(cpu, BREAKPOINT, cpu->pc);
    case 0x30200073:                            /* MRET */
        *next = cpu->epc;
        cpu->interrupts_on = cpu->interrupts_were_on;
        cpu->interrupts_were_on = true;
        return true;
    case 0x10500073: cpu->waiting = true; return true;
    default: return csr_instruction(vm, insn);
    }
}

/* ---- memory ---- */

static bool load(struct machine *vm, uint32_t address, uint32_t kind, uint32_t insn, uint32_t *value)
{
    unsigned size = 1u << (kind & 3);
    uint32_t word = 0;
    const uint8_t *ram;

    if (kind == 3 || kind > 5)
        return trap(&vm->cpu, ILLEGAL, insn);
    if (address & (size - 1))
        return trap(&vm->cpu, LOAD_MISALIGNED, address);
    if ((ram = machine_ram(vm, address, size))) {
        memcpy(&word, ram, size);
        word = le32toh(word);
    } else if (!device_read(vm, address, size, &word)) {
        return trap(&vm->cpu, LOAD_FAULT, address);
    }
    *value = kind == 0 ? (uint32_t)(int8_t)word : kind == 1 ? (uint32_t)(int16_t)word : word;
    return true;
}

/* The one way by which the guest changes memory. Whoever watches is told after the write: told before, it might read
 * the page in between and take the mark for done. */
static bool store(struct machine *vm, uint32_t address, uint32_t kind, uint32_t insn, uint32_t value)
{
    unsigned size = 1u << (kind & 3);
    uint32_t word = htole32(value);
    uint8_t *ram;

    if (kind > 2)
        return trap(&vm->cpu, ILLEGAL, insn);
    if (address & (size - 1))
        return trap(&vm->cpu, STORE_MISALIGNED, address);
    if ((ram = machine_ram(vm, address, size))) {
        memcpy(ram, &word, size);
        if (vm->wrote)
            vm->wrote(vm, address - RAM_BASE, size);
    } else if (!device_write(vm, address, size, value)) {
        return trap(&vm->cpu, STORE_FAULT, address);
    }
    return true;
}

/* ---- arithmetic ---- */

/* The compilers that build this keep the sign when they shift a negative number. */
static uint32_t shift_right_arithmetic(uint32_t a, uint32_t by)
{
    return (uint32_t)((int32_t)a >> by);
}

static uint32_t muldiv(uint32_t kind, uint32_t a, uint32_t b)
{
    int64_t sa = (int32_t)a, sb = (int32_t)b;

    switch (kind) {
    case 0: return a * b;
    case 1: return (uint32_t)((uint64_t)(sa * sb) >> 32);
    case 2: return (uint32_t)((uint64_t)(sa * (int64_t)b) >> 32);
    case 3: return (uint32_t)((uint64_t)a * b >> 32);
    case 4: return b ? (uint32_t)(sa / sb) : UINT32_MAX;        /* in 64 bits the quotient cannot overflow */
    case 5: return b ? a / b : UINT32_MAX;
    case 6: return b ? (uint32_t)(sa % sb) : a;
    default: return b ? a % b : a;
    }
}

/* ADD to AND; `alternate` makes SUB of ADD and SRA of SRL. */
static uint32_t compute(uint32_t kind, bool alternate, uint32_t a, uint32_t b)
{
    switch (kind) {
    case 0: return alternate ? a - b : a + b;
    case 1: return a << (b & 31);
    case 2: return (int32_t)a < (int32_t)b;
    case 3: return a < b;
    case 4: return a ^ b;
    case 5: return alternate ? shift_right_arithmetic(a, b & 31) : a >> (b & 31);
    case 6: return a | b;
    default: return a & b;
    }
}

static bool arithmetic(struct cpu *cpu, uint32_t insn, uint32_t a, uint32_t b)
{
    uint32_t kind = insn >> 12 & 7, upper = insn >> 25, rd = insn >> 7 & 31;
    bool immediate = (insn & 0x7f) == OP_IMM, shift = kind == 1 || kind == 5;

    if (immediate) {
        if (shift && upper != 0 && !(kind == 5 && upper == 0x20))
            return trap(cpu, ILLEGAL, insn);
        cpu->x[rd] = compute(kind, shift && upper == 0x20, a, shift_right_arithmetic(insn, 20));
        return true;
    }
    if (upper == 1)
        cpu->x[rd] = muldiv(kind, a, b);
    else if (upper == 0 || (upper == 0x20 && (kind == 0 || kind == 5)))
        cpu->x[rd] = compute(kind, upper == 0x20, a, b);
    else
        return trap(cpu, ILLEGAL, insn);
    return true;
}

/* ---- jumps ---- */

static bool jump(struct cpu *cpu, uint32_t target, uint32_t *next)
{
    if (target & 3)
        return trap(cpu, FETCH_MISALIGNED, target);
    *next = target;
    return true;
}

static bool branch(struct cpu *cpu, uint32_t insn, uint32_t a, uint32_t b, uint32_t *next)
{
    uint32_t kind = insn >> 12 & 7;
    uint32_t offset = shift_right_arithmetic(insn & 0x80000000u, 19) | (insn << 4 & 0x800) | (insn >> 20 & 0x7e0) |
                      (insn >> 7 & 0x1e);
    bool holds;

    if (kind == 2 || kind == 3)
        return trap(cpu, ILLEGAL, insn);
    holds = kind < 2 ? a == b : kind < 6 ? (int32_t)a < (int32_t)b : a < b;
    return holds == (kind & 1) || jump(cpu, cpu->pc + offset, next);    /* the odd kinds are the opposites */
}

static uint32_t jal_offset(uint32_t insn)
{
    return shift_right_arithmetic(insn & 0x80000000u, 11) | (insn & 0xff000) | (insn >> 9 & 0x800) | (insn >> 20 & 0x7fe);
}

/* ---- one instruction ---- */

/* False if it trapped; `cpu->pc` is then where the handler is. */
static bool execute(struct machine *vm, uint32_t insn)
{
    struct cpu *cpu = &vm->cpu;
    uint32_t *x = cpu->x, *rd = &x[insn >> 7 & 31], a = x[insn >> 15 & 31], b = x[insn >> 20 & 31];
    uint32_t kind = insn >> 12 & 7, next = cpu->pc + 4, high = shift_right_arithmetic(insn, 20);
    bool done;

    switch (insn & 0x7f) {
    case LUI: *rd = insn & 0xfffff000, done = true; break;
    case AUIPC: *rd = cpu->pc + (insn & 0xfffff000), done = true; break;
    case OP: case OP_IMM: done = arithmetic(cpu, insn, a, b); break;
    case LOAD: done = load(vm, a + high, kind, insn, rd); break;
    case STORE: done = store(vm, a + ((high & ~31u) | (insn >> 7 & 31)), kind, insn, b); break;
    case BRANCH: done = branch(cpu, insn, a, b, &next); break;
    case JAL:
        if ((done = jump(cpu, cpu->pc + jal_offset(insn), &next)))
            *rd = cpu->pc + 4;
        break;
    case JALR:
        if ((done = kind ? trap(cpu, ILLEGAL, insn) : jump(cpu, (a + high) & ~1u, &next)))
            *rd = cpu->pc + 4;
        break;
    case FENCE: done = kind <= 1 || trap(cpu, ILLEGAL, insn); break;    /* one hart, no cache: nothing to order */
    case SYSTEM: done = system_instruction(vm, insn, &next); break;
    default: done = trap(cpu, ILLEGAL, insn);
    }
    x[0] = 0;
    if (done)
        cpu->pc = next;
    return done;
}

static void step(struct machine *vm)
{
    struct cpu *cpu = &vm->cpu;
    const uint8_t *at = machine_ram(vm, cpu->pc, 4);
    uint32_t insn;

    if (at) {
        memcpy(&insn, at, 4);
        cpu->retired += execute(vm, le32toh(insn));
    } else {
        trap(cpu, FETCH_FAULT, cpu->pc);
    }
    cpu->cycles++;
}

/* ---- running ---- */

void cpu_run(struct machine *vm, unsigned instructions)
{
    struct cpu *cpu = &vm->cpu;

    while (instructions-- > 0 && !vm->off) {
        if (cpu->pending & cpu->enabled) {
            cpu->waiting = false;               /* WFI ends also where interrupts are off */
            if (cpu->interrupts_on)
                interrupt(cpu);
        }
        if (cpu->waiting)
            return;
        step(vm);
    }
}

/* a0: the hart's number, as everywhere; a1: how much RAM there is, for want of a device tree. */
void cpu_reset(struct cpu *cpu, uint32_t ram_size)
{
    *cpu = (struct cpu){ .pc = RAM_BASE };
    cpu->x[11] = ram_size;
}

bool cpu_is_sound(const struct cpu *cpu)
{
    return cpu->x[0] == 0 && cpu->pc % 4 == 0 && cpu->epc % 4 == 0 && !(cpu->vector & 2) &&
           !((cpu->enabled | cpu->pending) & ~(IRQ_SOFTWARE | IRQ_TIMER | IRQ_EXTERNAL));
}
