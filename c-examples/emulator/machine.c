/* The machine around the CPU: RAM, three devices, time.                                  SPDX: MIT OR Apache-2.0 */
#include "emulator.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 2000 };                          /* instructions between two looks at the clock */

/* ---- time: the machine's clock counts while it runs, and stands still while it does not ---- */

static uint64_t host_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void count_time(struct machine *vm)
{
    uint64_t now = host_ns();

    vm->clint.clock_ns += now - vm->seen_ns;
    vm->seen_ns = now;
}

uint64_t machine_ticks(struct machine *vm)
{
    if (vm->running)
        count_time(vm);
    return vm->clint.clock_ns / TICK_NS + vm->clint.offset;
}

void machine_resume(struct machine *vm)
{
    vm->seen_ns = host_ns();
    vm->running = true;
}

void machine_pause(struct machine *vm)
{
    machine_ticks(vm);                          /* counts up to now, if it ran at all */
    vm->running = false;
}

static bool uart_interrupts(const struct uart *uart)
{
    return uart->ier & 1 && uart->rx_count > 0;
}

static void look_at_interrupts(struct machine *vm)
{
    vm->cpu.pending = (vm->clint.software ? IRQ_SOFTWARE : 0) |
                      (machine_ticks(vm) >= vm->clint.compare ? IRQ_TIMER : 0) |
                      (uart_interrupts(&vm->uart) ? IRQ_EXTERNAL : 0);
}

/* ---- the console ---- */

static void console_put(struct machine *vm, uint8_t byte)
{
    ssize_t n;

    do
        n = write(vm->console, &byte, 1);
    while (n < 0 && errno == EINTR);            /* a console that is gone prints nothing */
}

void machine_type(struct machine *vm, char c)
{
    if (vm->uart.rx_count < UART_FIFO)          /* typed too fast: lost, as on a real one */
        vm->uart.rx[vm->uart.rx_count++] = (uint8_t)c;
}

bool uart_is_sound(const struct uart *uart)
{
    return uart->rx_count <= UART_FIFO && uart->ier <= 1;
}

static uint8_t uart_take(struct uart *uart)
{
    uint8_t first = uart->rx[0];

    if (uart->rx_count == 0)
        return 0;
    memmove(uart->rx, uart->rx + 1, --uart->rx_count);
    return first;
}

static uint8_t uart_read(struct uart *uart, uint32_t reg)
{
    bool divisor = uart->lcr & 0x80;

    switch (reg) {
    case 0: return divisor ? uart->dll : uart_take(uart);
    case 1: return divisor ? uart->dlm : uart->ier;
    case 2: return uart_interrupts(uart) ? 0x04 : 0x01;
    case 3: return uart->lcr;
    case 5: return 0x60 | (uart->rx_count > 0); /* what is sent is sent at once */
    case 7: return uart->scratch;
    default: return 0;
    }
}

static void uart_write(struct machine *vm, uint32_t reg, uint8_t value)
{
    struct uart *uart = &vm->uart;
    bool divisor = uart->lcr & 0x80;

    if (reg == 0 && !divisor)
        console_put(vm, value);
    else if (reg == 0)
        uart->dll = value;
    else if (reg == 1 && divisor)
        uart->dlm = value;
    else if (reg == 1)
        uart->ier = value & 1;
    else if (reg == 2 && value & 2)
        uart->rx_count = 0;
    else if (reg == 3)
        uart->lcr = value;
    else if (reg == 7)
        uart->scratch = value;
}

/* ---- the timer and the software interrupt ---- */

enum { CLINT_SOFTWARE = 0, CLINT_COMPARE = 0x4000, CLINT_TIME = 0xbff8 };

static uint32_t half(uint64_t number, uint32_t offset)
{
    return (uint32_t)(offset & 4 ? number >> 32 : number);
}

static uint64_t with_half(uint64_t number, uint32_t offset, uint32_t value)
{
    return offset & 4 ? (uint32_t)number | (uint64_t)value << 32 : (number >> 32) << 32 | value;
}

static bool clint_read(struct machine *vm, uint32_t offset, uint32_t *value)
{
    switch (offset & ~4u) {
    case CLINT_SOFTWARE: *value = offset ? 0 : vm->clint.software; return true;
    case CLINT_COMPARE: *value = half(vm->clint.compare, offset); return true;
    case CLINT_TIME: *value = half(machine_ticks(vm), offset); return true;
    default: return false;
    }
}

static bool clint_write(struct machine *vm, uint32_t offset, uint32_t value)
{
    struct clint *clint = &vm->clint;
    uint64_t now;

    switch (offset & ~4u) {
    case CLINT_SOFTWARE:
        if (offset == 0)
            clint->software = value & 1;
        return true;
    case CLINT_COMPARE: clint->compare = with_half(clint->compare, offset, value); return true;
    case CLINT_TIME:
        now = machine_ticks(vm);
        clint->offset += with_half(now, offset, value) - now;
        return true;
    default: return false;
    }
}

static void power_write(struct machine *vm, uint32_t value)
{
    enum { PASS = 0x5555, FAIL = 0x3333 };

    if ((value & 0xffff) != PASS && (value & 0xffff) != FAIL)
        return;
    vm->off = true;
    vm->off_code = (value & 0xffff) == PASS ? 0 : value >> 16 ? (uint16_t)(value >> 16) : 1;
}

/* ---- the bus: false where nobody answers, which is an access fault ---- */

bool device_read(struct machine *vm, uint32_t address, unsigned size, uint32_t *value)
{
    if (address - UART_BASE < UART_SIZE && size == 1)
        *value = uart_read(&vm->uart, address - UART_BASE);
    else if (address - CLINT_BASE >= CLINT_SIZE || size != 4 || !clint_read(vm, address - CLINT_BASE, value))
        return false;
    look_at_interrupts(vm);
    return true;
}

bool device_write(struct machine *vm, uint32_t address, unsigned size, uint32_t value)
{
    if (address - UART_BASE < UART_SIZE && size == 1)
        uart_write(vm, address - UART_BASE, (uint8_t)value);
    else if (address == POWER_BASE && size == 4)
        power_write(vm, value);
    else if (address - CLINT_BASE >= CLINT_SIZE || size != 4 || !clint_write(vm, address - CLINT_BASE, value))
        return false;
    look_at_interrupts(vm);
    return true;
}

/* ---- running ---- */

void machine_run(struct machine *vm, unsigned budget_ms)
{
    uint64_t end = host_ns() + budget_ms * 1000000ull;

    do {
        look_at_interrupts(vm);
        cpu_run(vm, BATCH);
    } while (!vm->off && !vm->cpu.waiting && vm->seen_ns < end);
}

int machine_wait_ms(struct machine *vm)
{
    const uint64_t ticks_per_ms = 1000000 / TICK_NS;
    uint64_t ticks;

    if (!vm->running)
        return -1;
    look_at_interrupts(vm);
    if (!vm->cpu.waiting || vm->cpu.pending & vm->cpu.enabled)
        return 0;
    if (!(vm->cpu.enabled & IRQ_TIMER))
        return -1;
    ticks = vm->clint.compare - machine_ticks(vm);
    return ticks < 1000 * ticks_per_ms ? (int)(ticks / ticks_per_ms) + 1 : 1000;
}

/* ---- making one ---- */

int machine_create(struct machine *vm, uint32_t ram_size, int console)
{
    uint64_t pages = ram_size >> PAGE_SHIFT;

    *vm = (struct machine){ .ram_size = ram_size, .console = console, .clint.compare = UINT64_MAX };
    vm->page_log = calloc((pages + 63) / 64, sizeof *vm->page_log);
    vm->ram = mmap(NULL, ram_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (vm->ram == MAP_FAILED || !vm->page_log)
        return -ENOMEM;
    cpu_reset(&vm->cpu, ram_size);
    return 0;
}

void machine_destroy(struct machine *vm)
{
    munmap(vm->ram, vm->ram_size);
    free(vm->page_log);
}

int machine_load(struct machine *vm, const char *image)
{
    int fd = open(image, O_RDONLY | O_CLOEXEC), err = 0;
    uint32_t have = 0;
    ssize_t n = 1;

    if (fd < 0)
        return -errno;
    while (n > 0 && have < vm->ram_size) {
        if ((n = read(fd, vm->ram + have, vm->ram_size - have)) < 0)
            err = -errno;
        else
            have += (uint32_t)n;
    }
    close(fd);
    return err ? err : n != 0 ? -EFBIG : have == 0 ? -ENOEXEC : 0;
}

/* ---- which pages were written ---- */

void machine_log(struct machine *vm, uint32_t offset, uint32_t len)
{
    (void)len;                                  /* a store never reaches into a second page: it is aligned */
    vm->page_log[offset >> (PAGE_SHIFT + 6)] |= 1ull << (offset >> PAGE_SHIFT & 63);
}

uint64_t machine_take_log(struct machine *vm, uint64_t word)
{
    uint64_t taken = vm->page_log[word];

    vm->page_log[word] = 0;
    return taken;
}

/* Of everything that must be the same after a move. */
uint64_t machine_hash(const struct machine *vm)
{
    const struct cpu *cpu = &vm->cpu;
    const uint64_t rest[] = {
        cpu->pc, cpu->interrupts_on, cpu->interrupts_were_on, cpu->enabled, cpu->vector, cpu->scratch, cpu->epc, cpu->cause,
        cpu->value, cpu->cycles, cpu->retired, cpu->waiting, vm->clint.clock_ns, vm->clint.offset, vm->clint.compare,
        vm->clint.software, vm->uart.ier, vm->uart.lcr, vm->uart.dll, vm->uart.dlm, vm->uart.scratch, vm->uart.rx_count,
    };
    uint64_t hash = 0x9e3779b97f4a7c15, word;

    for (uint32_t i = 0; i < vm->ram_size; i += 8) {
        memcpy(&word, vm->ram + i, 8);
        hash = (hash ^ word) * 0xff51afd7ed558ccd, hash ^= hash >> 29;
    }
    for (int i = 0; i < 32; i++)
        hash = (hash ^ cpu->x[i]) * 0xff51afd7ed558ccd, hash ^= hash >> 29;
    for (size_t i = 0; i < sizeof rest / sizeof rest[0]; i++)
        hash = (hash ^ rest[i]) * 0xff51afd7ed558ccd, hash ^= hash >> 29;
    for (int i = 0; i < vm->uart.rx_count; i++)
        hash = (hash ^ vm->uart.rx[i]) * 0xff51afd7ed558ccd, hash ^= hash >> 29;
    return hash;
}
