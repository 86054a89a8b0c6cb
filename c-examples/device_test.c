/* A unit test of one device: would it survive a migration?                              SPDX: MIT OR Apache-2.0
 *
 *   device_test             tries a UART and finds nothing
 *   device_test forgets     the same UART, its table without a member: what a finding looks like
 *   device_test trusts      the same UART, believing an index from the stream: needs -fsanitize=address,undefined
 *
 * No guest runs and nothing is sent. The device is registered as in the VMM, and vmig_test_device() does the rest. */
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vmig.h>

/* ---- the device, as the VMM has it --------------------------------------------------------------------------- */

enum { FIFO = 16, IER_RX = 1 };

struct uart {
    uint8_t ier, lcr, mcr, scratch;
    uint16_t divisor;                   /* baud rate; since version 2 */
    uint8_t rx[FIFO];
    uint8_t head;                       /* of the ring `rx` */
    uint8_t len;
    bool irq;                           /* what the interrupt controller sees: follows from the rest, so it does not travel */
    uint8_t next;                       /* what the guest reads next: follows, too */
    uint64_t timeout;                   /* of the FIFO, in the guest's time */
    FILE *out;                          /* of this process: where characters go */
};

static bool trusts;                     /* the bug of `device_test trusts` */

static void uart_reset(struct uart *u)
{
    FILE *out = u->out;

    memset(u, 0, sizeof *u);
    u->divisor = 12, u->timeout = UINT64_MAX, u->out = out;
}

static void uart_update(struct uart *u)
{
    u->irq = u->len > 0 && (u->ier & IER_RX);
    u->next = u->len > 0 ? u->rx[u->head] : 0;
}

static void uart_receive(struct uart *u, uint8_t c)
{
    if (u->len < FIFO)
        u->rx[(u->head + u->len++) % FIFO] = c;
    uart_update(u);
}

/* The bytes came from somewhere else: everything is checked before it is used. */
static int uart_post_load(void *opaque, uint32_t version)
{
    struct uart *u = opaque;

    if (!trusts && (u->head >= FIFO || u->len > FIFO))
        return -EINVAL;
    if (version < 2)
        u->divisor = 12;
    uart_update(u);
    return 0;
}

static const vmig_field fields[] = {
    VMIG_U8(struct uart, ier), VMIG_U8(struct uart, lcr), VMIG_U8(struct uart, mcr), VMIG_U8(struct uart, scratch),
    VMIG_BYTES(struct uart, rx), VMIG_U8(struct uart, head), VMIG_U8(struct uart, len), VMIG_TIMER(struct uart, timeout),
    VMIG_SINCE(2), VMIG_U16(struct uart, divisor),
    VMIG_END,
};
/* The bug of `device_test forgets`: who would miss `lcr`? */
static const vmig_field forgetful[] = {
    VMIG_U8(struct uart, ier), VMIG_U8(struct uart, mcr), VMIG_U8(struct uart, scratch),
    VMIG_BYTES(struct uart, rx), VMIG_U8(struct uart, head), VMIG_U8(struct uart, len), VMIG_TIMER(struct uart, timeout),
    VMIG_SINCE(2), VMIG_U16(struct uart, divisor),
    VMIG_END,
};
static vmig_device uart_kind = {
    .size = sizeof(vmig_device), .name = "uart", .version = 2, .oldest = 1, .fields = fields,
    .post_load = uart_post_load,
};

/* ---- its test ------------------------------------------------------------------------------------------------ */

static int reset(void *dev)
{
    uart_reset(dev);
    return 0;
}

static char now[512];                   /* the case that is tried: where to look if it crashes */

static void take_line(void *opaque, int level, const char *line)
{
    (void)opaque;
    if (level == VMIG_LOG_DEBUG)
        snprintf(now, sizeof now, "%s", line);
    else if (level != VMIG_LOG_ERROR)   /* that one is vmig_errmsg(), too */
        printf("%s%s\n", level == VMIG_LOG_WARNING ? "note: " : "", line);
}

/* Sanitizers end the process; this says in which case. Weak: without them nobody has it. */
void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));
static void died(void)
{
    fprintf(stderr, "device_test: died in: %s\n", now);
}

/* The same for UndefinedBehaviorSanitizer, which has a runtime of its own. */
void __ubsan_on_report(void);
void __ubsan_on_report(void)
{
    died();
}

static int no_guest(void *vm)
{
    (void)vm;
    return 0;
}

int main(int argc, char **argv)
{
    static const char line[] = "hello from the wire";
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    vmig_device_test how = VMIG_SIZED(vmig_device_test);
    struct uart *u = calloc(1, sizeof *u);      /* of its own, so that AddressSanitizer sees its ends */
    vmig *m = NULL;
    int err;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 2 && strcmp(argv[1], "forgets") == 0)
        uart_kind.fields = forgetful;
    trusts = argc == 2 && strcmp(argv[1], "trusts") == 0;
    if (!u || (argc != 1 && !trusts && uart_kind.fields == fields))
        return 2;
    if (__sanitizer_set_death_callback)
        __sanitizer_set_death_callback(died);

    /* A state worth moving: nothing as it is after a reset. */
    uart_reset(u);
    u->ier = IER_RX, u->lcr = 3, u->mcr = 8, u->scratch = 0x5a, u->divisor = 1, u->timeout = 123456789, u->head = 9;
    for (size_t i = 0; line[i]; i++)
        uart_receive(u, (uint8_t)line[i]);

    ops.stop = no_guest, ops.start = no_guest;
    how.memory = sizeof *u, how.reset = reset, how.log = take_line;
    if ((err = vmig_new(&ops, NULL, &m)) < 0)
        return 1;
    vmig_bql_lock(m);
    err = vmig_add_device(m, &uart_kind, 0, u);
    vmig_bql_unlock(m);
    if (err < 0 || (err = vmig_test_device(m, "uart", 0, &how)) < 0)
        printf("found: %s\n", vmig_errmsg());
    else
        printf("nothing found\n");
    vmig_free(m);
    free(u);
    return err < 0;
}
