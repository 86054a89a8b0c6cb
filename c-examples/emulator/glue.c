/* All that makes the emulator migratable: its pause and resume, its state, its memory.   SPDX: MIT OR Apache-2.0 */
#include "emulator.h"
#include <errno.h>
#include <string.h>
#include <vmig.h>

/* The thread that runs the guest is the one that runs these, so the guest stands still already. */
static int stop(void *vm)  { machine_pause(vm); return 0; }
static int start(void *vm) { machine_resume(vm); return 0; }

/* What comes from elsewhere is looked at before the interpreter believes it. */
static int cpu_loaded(void *cpu, uint32_t version)   { (void)version; return cpu_is_sound(cpu) ? 0 : -EINVAL; }
static int uart_loaded(void *uart, uint32_t version) { (void)version; return uart_is_sound(uart) ? 0 : -EINVAL; }

static const vmig_field cpu_fields[] = {
    VMIG_U32_ARRAY(struct cpu, x), VMIG_U32(struct cpu, pc), VMIG_BOOL(struct cpu, interrupts_on),
    VMIG_BOOL(struct cpu, interrupts_were_on), VMIG_U32(struct cpu, enabled), VMIG_U32(struct cpu, pending),
    VMIG_U32(struct cpu, vector), VMIG_U32(struct cpu, scratch), VMIG_U32(struct cpu, epc), VMIG_U32(struct cpu, cause),
    VMIG_U32(struct cpu, value), VMIG_U64(struct cpu, cycles), VMIG_U64(struct cpu, retired), VMIG_BOOL(struct cpu, waiting),
    VMIG_END,
};
static const vmig_field clint_fields[] = {
    VMIG_U64(struct clint, clock_ns), VMIG_U64(struct clint, offset), VMIG_U64(struct clint, compare),
    VMIG_U32(struct clint, software), VMIG_END,
};
static const vmig_field uart_fields[] = {
    VMIG_U8(struct uart, ier), VMIG_U8(struct uart, lcr), VMIG_U8(struct uart, dll), VMIG_U8(struct uart, dlm),
    VMIG_U8(struct uart, scratch), VMIG_U8(struct uart, rx_count), VMIG_BYTES(struct uart, rx), VMIG_END,
};
static const vmig_device kinds[] = {
    { .size = sizeof(vmig_device), .name = "cpu", .version = 1, .fields = cpu_fields, .post_load = cpu_loaded },
    { .size = sizeof(vmig_device), .name = "clint", .version = 1, .fields = clint_fields },
    { .size = sizeof(vmig_device), .name = "uart", .version = 1, .fields = uart_fields, .post_load = uart_loaded },
};

/* Two ways to tell which pages were written: mark each store, or keep a bitmap that the library asks for. */
static void mark(struct machine *vm, uint32_t offset, uint32_t len)
{
    vmig_dirty(vm->migration, vm->ram + offset, len);
}

static int take_bitmap(void *vm, const vmig_dirty_bitmap *map)
{
    for (uint64_t i = 0; i < (map->pages + 63) / 64; i++)
        map->bits[i] |= machine_take_log(vm, map->first / 64 + i);
    return 0;
}

int migratable(struct machine *vm, const char *tracker)
{
    bool marks = strcmp(tracker, "marks") == 0, bitmap = strcmp(tracker, "bitmap") == 0;
    vmig_ops ops = { .size = sizeof ops, .stop = stop, .start = start };
    vmig_ram ram = { .size = sizeof ram, .name = "ram", .host = vm->ram, .len = vm->ram_size, .gpa = RAM_BASE };
    vmig_dirty_source log = { .size = sizeof log, .name = "bitmap", .flags = VMIG_SOURCE_ALL_WRITES, .sync = take_bitmap };
    void *devices[] = { &vm->cpu, &vm->clint, &vm->uart };
    int err = vmig_new(&ops, vm, &vm->migration);

    vm->wrote = marks ? mark : bitmap ? machine_log : NULL;
    if (err < 0 || (err = vmig_set(vm->migration, "dispatch", "manual")) < 0 ||
        (err = vmig_set(vm->migration, "dirty-tracker", vm->wrote ? "callback" : tracker)) < 0 ||
        (err = vmig_add_ram(vm->migration, &ram)) < 0 ||
        (bitmap && (err = vmig_add_dirty_source(vm->migration, &log, vm)) < 0))
        return err;
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0] && err >= 0; i++)
        err = vmig_add_device(vm->migration, &kinds[i], 0, devices[i]);
    return err;
}
