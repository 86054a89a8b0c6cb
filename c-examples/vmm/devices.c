/* Ports: the serial console, the probe the guest reports through, the ticker's registers. SPDX: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "vmm.h"
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS_TIMEOUT_MS = 2000 };      /* a vCPU may not hang for ever on a harness that does not read */

uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* One line to whoever watches the guest. Lines are shorter than PIPE_BUF, so those of two vCPUs never mix. */
void event_line(struct machine *vm, const char *format, ...)
{
    struct pollfd out = { .fd = vm->events_fd, .events = POLLOUT };
    char line[256];
    va_list args;
    int n;

    if (vm->events_fd < 0)
        return;
    va_start(args, format);
    n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (n < 0 || (size_t)n >= sizeof line)
        machine_die(EXIT_VMM_FAULT, "event line too long: %s", line);
    if (poll(&out, 1, EVENTS_TIMEOUT_MS) != 1 || write(vm->events_fd, line, (size_t)n) != n) {
        fprintf(stderr, "vmm: nobody reads the events any more\n");
        vm->events_fd = -1;
    }
}

/* ---- the serial port ---- */

static void uart_out(struct machine *vm, unsigned reg, uint8_t value)
{
    struct uart *u = &vm->uart;
    bool latch = u->lcr & 0x80;

    switch (reg) {
    case 0:
        if (latch)
            u->dll = value;
        else if (vm->serial_fd >= 0 && write(vm->serial_fd, &value, 1) != 1)
            vm->serial_fd = -1;                         /* an unplugged console does not stop a machine */
        break;
    case 1: *(latch ? &u->dlm : &u->ier) = value; break;
    case 2:
        u->fcr = value;
        if (value & 2)
            u->rx_count = 0;
        break;
    case 3: u->lcr = value; break;
    case 4: u->mcr = value; break;
    case 7: u->scratch = value; break;
    default: break;                                     /* status registers are read-only */
    }
}

static uint8_t uart_receive(struct uart *u)
{
    uint8_t c = u->rx[0];

    if (!u->rx_count)
        return 0;
    u->rx_count--;
    memmove(u->rx, u->rx + 1, u->rx_count);
    return c;
}

static uint8_t uart_in(struct uart *u, unsigned reg)
{
    bool latch = u->lcr & 0x80;

    switch (reg) {
    case 0: return latch ? u->dll : uart_receive(u);
    case 1: return latch ? u->dlm : u->ier;
    case 2: return (u->fcr & 1 ? 0xc0 : 0) | 1;         /* no interrupt pending */
    case 3: return u->lcr;
    case 4: return u->mcr;
    case 5: return 0x60 | (u->rx_count ? 1 : 0);        /* always ready to send */
    case 6: return 0xb0;                                /* carrier, ready, clear to send */
    default: return u->scratch;
    }
}

void uart_type(struct machine *vm, const char *text)
{
    struct uart *u = &vm->uart;

    while (*text && u->rx_count < sizeof u->rx)
        u->rx[u->rx_count++] = (uint8_t)*text++;
}

/* ---- the probe ---- */

static uint64_t probe_u64(const struct probe *p, unsigned index)
{
    return p->word[index] | (uint64_t)p->word[index + 1] << 32;
}

static void probe_fault(struct vcpu *vcpu, const char *what)
{
    const struct probe *p = &vcpu->probe;
    uint64_t where = probe_u64(p, 0), expected = probe_u64(p, 2), found = probe_u64(p, 4);

    event_line(vcpu->vm, "fault %u %s 0x%" PRIx64 " 0x%" PRIx64 " 0x%" PRIx64 "\n", vcpu->index, what, where, expected,
               found);
    machine_die(EXIT_GUEST_FAULT, "vCPU %u: wrong %s at 0x%" PRIx64 ": expected 0x%" PRIx64 ", found 0x%" PRIx64
                " (after generation %" PRIu32 ")", vcpu->index, what, where, expected, found, p->generation);
}

static void probe_commit(struct vcpu *vcpu, uint32_t kind)
{
    struct probe *p = &vcpu->probe;

    if (p->words != (kind == PROBE_GENERATION ? 5u : 6u))
        machine_die(EXIT_GUEST_FAULT, "vCPU %u: report %" PRIu32 " with %" PRIu32 " words", vcpu->index, kind, p->words);
    switch (kind) {
    case PROBE_GENERATION:
        if (p->word[0] != p->generation + 1)
            machine_die(EXIT_GUEST_FAULT, "vCPU %u: generation %" PRIu32 " follows %" PRIu32, vcpu->index, p->word[0],
                        p->generation);
        p->generation = p->word[0];
        p->verified += p->word[1];
        event_line(vcpu->vm, "gen %u %" PRIu32 " %" PRIu32 " %" PRIu32 " %" PRIu64 " %" PRIu32 " %" PRIu32 "\n",
                   vcpu->index, p->word[0], p->word[1], p->word[2], now_ns(), p->word[3], p->word[4]);
        break;
    case PROBE_BAD_PAGE: probe_fault(vcpu, "page"); break;
    case PROBE_BAD_TSC: probe_fault(vcpu, "TSC"); break;
    case PROBE_BAD_VECTOR: probe_fault(vcpu, "vector-register"); break;
    case PROBE_BAD_TICKER: probe_fault(vcpu, "ticker-count"); break;
    default: machine_die(EXIT_GUEST_FAULT, "vCPU %u: unknown report %" PRIu32, vcpu->index, kind);
    }
    p->words = 0;
}

static void probe_push(struct vcpu *vcpu, uint32_t value)
{
    struct probe *p = &vcpu->probe;

    if (p->words < PROBE_WORDS)
        p->word[p->words] = value;
    p->words++;
}

/* ---- dispatch ---- */

uint32_t port_in(struct vcpu *vcpu, uint16_t port, unsigned size)
{
    struct machine *vm = vcpu->vm;
    uint32_t value = UINT32_MAX >> (32 - 8 * size);     /* an empty bus reads as ones */

    pthread_mutex_lock(&vm->lock);
    if (port >= PORT_SERIAL && port < PORT_SERIAL + 8 && size == 1)
        value = uart_in(&vm->uart, port - PORT_SERIAL);
    else if (port == PORT_TICKER_COUNT && size == 4)
        value = vm->ticker.count;
    pthread_mutex_unlock(&vm->lock);
    return value;
}

void port_out(struct vcpu *vcpu, uint16_t port, unsigned size, uint32_t value)
{
    struct machine *vm = vcpu->vm;

    if (port == PORT_HEARTBEAT) {
        event_line(vm, "beat %u %" PRIu64 "\n", vcpu->index, now_ns());
        return;                                         /* no state: no lock that could delay the next one */
    }
    pthread_mutex_lock(&vm->lock);
    if (port >= PORT_SERIAL && port < PORT_SERIAL + 8 && size == 1)
        uart_out(vm, port - PORT_SERIAL, (uint8_t)value);
    else if (port == PORT_PROBE_WORD && size == 4)
        probe_push(vcpu, value);
    else if (port == PORT_PROBE_COMMIT && size == 4)
        probe_commit(vcpu, value);
    else if (port == PORT_TICKER_PERIOD && size == 4)
        ticker_set_period(vm, value);
    pthread_mutex_unlock(&vm->lock);
}
