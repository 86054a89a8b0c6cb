/* A RISC-V machine that is interpreted on one thread.                                   SPDX: MIT OR Apache-2.0
 *
 *   cpu.c      RV32IM with Zicsr, machine mode only
 *   machine.c  RAM, the console, the timer, the power switch; time
 *   glue.c     what makes it migratable
 *   main.c     options, and the poll loop
 *   commands.c what an operator may ask for
 *
 * Nothing here takes a lock, for there is nobody to lock out. */
#ifndef EMULATOR_H
#define EMULATOR_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- the memory map ---- */

#define CLINT_BASE 0x02000000u          /* timer and software interrupt, as SiFive's */
#define CLINT_SIZE 0x00010000u
#define UART_BASE 0x10000000u           /* the part of a 16550 that a console needs; its interrupt is the external one */
#define UART_SIZE 8u
#define POWER_BASE 0x00100000u          /* write 0x5555: off; 0x3333 | code << 16: off, because something is wrong */
#define POWER_SIZE 4u
#define RAM_BASE 0x80000000u

#define TICK_NS 100u                    /* the timer counts at 10 MHz */
#define PAGE_SHIFT 12u

/* Interrupts, as bits of the CSRs mip and mie. */
#define IRQ_SOFTWARE (1u << 3)
#define IRQ_TIMER (1u << 7)
#define IRQ_EXTERNAL (1u << 11)

/* ---- state: everything that must travel is in these three, and in RAM ---- */

struct cpu {
    uint32_t x[32], pc;
    bool interrupts_on, interrupts_were_on;     /* mstatus: MIE, MPIE */
    uint32_t enabled, pending;                  /* mie, mip */
    uint32_t vector, scratch, epc, cause, value; /* mtvec, mscratch, mepc, mcause, mtval */
    uint64_t cycles, retired;
    bool waiting;                               /* in WFI */
};

struct clint {
    uint64_t clock_ns;                          /* how long the machine has run; mtime is this in ticks */
    uint64_t offset;                            /* ticks: what the guest made of mtime by writing to it */
    uint64_t compare;                           /* mtimecmp */
    uint32_t software;                          /* msip */
};

enum { UART_FIFO = 16 };

struct uart {
    uint8_t ier, lcr, dll, dlm, scratch, rx_count;
    uint8_t rx[UART_FIFO];                      /* typed and not read yet, oldest first */
};

struct vmig;
struct machine {
    struct cpu cpu;
    struct clint clint;
    struct uart uart;
    uint8_t *ram;
    uint32_t ram_size;
    int console;                                /* where the guest's output goes */
    bool running;
    uint64_t seen_ns;                           /* host time up to which clock_ns counts */
    bool off;                                   /* the guest switched itself off, and how */
    uint16_t off_code;
    /* Called after each store of the guest, with its place in RAM; NULL: nobody needs to know. */
    void (*wrote)(struct machine *vm, uint32_t offset, uint32_t len);
    uint64_t *page_log;                         /* a bit for each page that was written, if machine_log() is `wrote` */
    struct vmig *migration;
};

/* cpu.c */
void cpu_reset(struct cpu *cpu, uint32_t ram_size);
void cpu_run(struct machine *vm, unsigned instructions);        /* fewer in WFI, and when it is switched off */
bool cpu_is_sound(const struct cpu *cpu);                       /* a state that the interpreter can go on from */

/* machine.c */
int machine_create(struct machine *vm, uint32_t ram_size, int console);
void machine_destroy(struct machine *vm);
int machine_load(struct machine *vm, const char *image);        /* a raw binary, to the start of RAM */
void machine_run(struct machine *vm, unsigned budget_ms);
int machine_wait_ms(struct machine *vm);                        /* how long poll() may sleep: 0 while there is work */
void machine_resume(struct machine *vm);
void machine_pause(struct machine *vm);
void machine_type(struct machine *vm, char c);
void machine_log(struct machine *vm, uint32_t offset, uint32_t len);    /* a `wrote` that keeps a bitmap of pages */
uint64_t machine_take_log(struct machine *vm, uint64_t word);           /* 64 pages of it, which are forgotten here */
bool uart_is_sound(const struct uart *uart);
uint64_t machine_hash(const struct machine *vm);
bool device_read(struct machine *vm, uint32_t address, unsigned size, uint32_t *value);
bool device_write(struct machine *vm, uint32_t address, unsigned size, uint32_t value);
uint64_t machine_ticks(struct machine *vm);                     /* mtime now */

/* The bytes of RAM there, or NULL. `size` is a power of two, and the address a multiple of it. */
static inline uint8_t *machine_ram(struct machine *vm, uint32_t address, unsigned size)
{
    uint32_t offset = address - RAM_BASE;

    return offset <= vm->ram_size - size ? vm->ram + offset : NULL;
}

/* glue.c */
int migratable(struct machine *vm, const char *tracker);

/* commands.c */
bool command(struct machine *vm, char *line);                   /* false: quit */
int arrive(struct machine *vm, const char *uri);                /* listens for a guest, and says where */
#endif
