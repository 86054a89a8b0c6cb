/* RAM, the VM, and what the guest finds when it boots.                                  SPDX: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "vmm.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define MIB (1024 * 1024ull)
#define GIB (1024 * MIB)

extern const uint8_t guest_image[], guest_image_end[];

void machine_die(int status, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    fputs("vmm: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    fflush(NULL);
    _exit(status);                      /* any thread may come here, with locks held: no handlers, no joins */
}

uint8_t *machine_host(struct machine *vm, uint64_t gpa)
{
    for (size_t i = 0; i < RAM_BLOCKS; i++)
        if (gpa >= vm->ram[i].gpa && gpa - vm->ram[i].gpa < vm->ram[i].len)
            return vm->ram[i].host + (gpa - vm->ram[i].gpa);
    return NULL;
}

/* ---- making the VM ---- */

static int ram_map(struct machine *vm, struct ram_block *ram, bool shared, bool huge)
{
    struct kvm_userspace_memory_region slot = { .slot = ram->slot, .guest_phys_addr = ram->gpa,
                                                .memory_size = ram->len };
    int flags = shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
    void *host;

    if (shared) {
        ram->fd = memfd_create(ram->name, MFD_CLOEXEC | (huge ? MFD_HUGETLB : 0));
        if (ram->fd < 0 || ftruncate(ram->fd, (off_t)ram->len) < 0)
            return -errno;
    }
    host = mmap(NULL, ram->len, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE, ram->fd, 0);
    if (host == MAP_FAILED)
        return -errno;
    ram->host = host;
    slot.userspace_addr = (uintptr_t)host;
    return ioctl(vm->vm_fd, KVM_SET_USER_MEMORY_REGION, &slot) < 0 ? -errno : 0;
}

static void ram_blocks(struct machine *vm, const struct machine_config *config)
{
    uint64_t low = config->mem_bytes / 2 < RAM_LOW_MAX ? config->mem_bytes / 2 : RAM_LOW_MAX;

    vm->ram[0] = (struct ram_block){ .name = "ram.low", .len = low, .gpa = 0, .slot = 0, .fd = -1 };
    vm->ram[1] = (struct ram_block){ .name = "ram.high", .len = config->mem_bytes - low, .gpa = GUEST_HIGH_BASE,
                                     .slot = 1, .fd = -1 };
}

static int ram_create(struct machine *vm, const struct machine_config *config)
{
    int err;

    if (config->firmware)
        firmware_blocks(vm, config);
    else
        ram_blocks(vm, config);
    for (size_t i = 0; i < RAM_BLOCKS; i++)
        if ((err = ram_map(vm, &vm->ram[i], config->shared, config->huge)) < 0)
            return err;
    return 0;
}

static int vm_create(struct machine *vm)
{
    uint64_t identity_map = 0xfffbc000;                 /* both inside the PCI hole */
    unsigned long tss = 0xfffbd000;
    struct kvm_pit_config pit = { 0 };
    int size;

    vm->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (vm->kvm_fd < 0)
        return -errno;
    if ((vm->vm_fd = ioctl(vm->kvm_fd, KVM_CREATE_VM, 0ul)) < 0 || ioctl(vm->vm_fd, KVM_SET_TSS_ADDR, tss) < 0 ||
        ioctl(vm->vm_fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map) < 0 ||
        ioctl(vm->vm_fd, KVM_CREATE_IRQCHIP, 0ul) < 0 || ioctl(vm->vm_fd, KVM_CREATE_PIT2, &pit) < 0 ||
        (size = ioctl(vm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0ul)) < 0)
        return -errno;
    vm->run_size = (size_t)size;
    return 0;
}

static void init_locks(struct machine *vm)
{
    pthread_condattr_t attr;

    pthread_mutex_init(&vm->lock, NULL);
    pthread_mutex_init(&vm->run_lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&vm->run_changed, &attr);
    pthread_cond_init(&vm->ticker.changed, &attr);
    pthread_condattr_destroy(&attr);
}

/* Before the first vCPU, or never. */
static int enable_ring(struct machine *vm, unsigned entries)
{
    struct kvm_enable_cap cap = { .cap = KVM_CAP_DIRTY_LOG_RING, .args = { entries * sizeof(struct kvm_dirty_gfn) } };

    return entries && ioctl(vm->vm_fd, KVM_ENABLE_CAP, &cap) < 0 ? -errno : 0;
}

/* A machine is born paused and empty: booted by machine_boot(), or filled by an incoming migration. */
int machine_create(struct machine *vm, const struct machine_config *config)
{
    int err;

    init_locks(vm);
    vm->paused = true;
    vm->ticker.expiry = TIMER_OFF;
    vm->uart.lcr = 3;
    if ((err = vm_create(vm)) < 0 || (err = enable_ring(vm, config->ring)) < 0 || (err = ram_create(vm, config)) < 0)
        return err;
    for (unsigned i = 0; i < config->vcpus; i++, vm->vcpus++)
        if ((err = vcpu_create(vm, i, &config->cpu)) < 0)
            return err;
    return 0;
}

void machine_destroy(struct machine *vm)
{
    for (size_t i = 0; i < vm->vcpus; i++) {
        munmap(vm->vcpu[i].run, vm->run_size);
        close(vm->vcpu[i].fd);
    }
    close(vm->vm_fd);
    close(vm->kvm_fd);
    for (size_t i = 0; i < RAM_BLOCKS; i++) {
        munmap(vm->ram[i].host, vm->ram[i].len);
        if (vm->ram[i].fd >= 0)
            close(vm->ram[i].fd);
    }
    pthread_cond_destroy(&vm->ticker.changed);
    pthread_cond_destroy(&vm->run_changed);
    pthread_mutex_destroy(&vm->run_lock);
    pthread_mutex_destroy(&vm->lock);
}

/* ---- booting: straight into ring 3 of long mode, so that no firmware and no kernel is needed ---- */

static uint64_t splitmix(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static void fill_page(uint64_t *page, uint64_t gpa, enum machine_fill fill)
{
    uint64_t stamp = guest_stamp(0, gpa), state = gpa;

    if (fill == FILL_ZERO) {
        for (size_t i = 0; i < GUEST_PAGE / 8; i++)
            ((volatile uint64_t *)page)[i] = 0;         /* touched, as a guest's own clearing would */
        return;
    }
    for (size_t i = 0; i < GUEST_PAGE / 8; i++)
        page[i] = fill == FILL_RANDOM ? splitmix(&state) : stamp;
    page[0] = page[GUEST_PAGE / 8 - 1] = stamp;
}

static void fill_ram(struct machine *vm, enum machine_fill fill)
{
    for (size_t b = 0; b < RAM_BLOCKS && fill != FILL_UNTOUCHED; b++) {
        const struct ram_block *ram = &vm->ram[b];
        for (uint64_t at = ram->gpa == 0 ? GUEST_FREE : 0; at < ram->len; at += GUEST_PAGE)
            fill_page((uint64_t *)(void *)(ram->host + at), ram->gpa + at, fill);
    }
}

/* 2 MiB pages for user mode, accessed and dirty from the start: the tables do not change while the guest runs. */
static void write_page_tables(struct machine *vm)
{
    enum { LINK = 0x27, LEAF = 0xe7, UNCACHED = 0x10 };     /* present, writable, user, accessed; dirty, large */
    uint64_t *pml4 = (uint64_t *)(void *)machine_host(vm, GUEST_PAGE_TABLES), *pdpt = pml4 + 512;
    uint64_t next = GUEST_PAGE_TABLES + 2 * GUEST_PAGE, *apic;

    pml4[0] = (GUEST_PAGE_TABLES + GUEST_PAGE) | LINK;
    for (size_t b = 0; b < RAM_BLOCKS; b++)
        for (uint64_t at = 0; at < vm->ram[b].len; at += 2 * MIB) {
            uint64_t gpa = vm->ram[b].gpa + at, *directory;
            if (!pdpt[gpa / GIB]) {
                pdpt[gpa / GIB] = next | LINK;
                next += GUEST_PAGE;
            }
            directory = (uint64_t *)(void *)machine_host(vm, pdpt[gpa / GIB] & ~0xfffull);
            directory[gpa / (2 * MIB) % 512] = gpa | LEAF;
        }
    if (!pdpt[GUEST_APIC / GIB])
        pdpt[GUEST_APIC / GIB] = next | LINK;
    apic = (uint64_t *)(void *)machine_host(vm, pdpt[GUEST_APIC / GIB] & ~0xfffull);
    apic[GUEST_APIC / (2 * MIB) % 512] = GUEST_APIC | LEAF | UNCACHED;
}

enum { CODE_SELECTOR = 0x23, DATA_SELECTOR = 0x2b, TSS_SELECTOR = 0x30, GDT_BYTES = 0x40, TSS_HEAD = 104,
       TSS_BYTES = TSS_HEAD + 65536 / 8 + 1 };

static void write_descriptors(struct machine *vm)
{
    uint64_t *gdt = (uint64_t *)(void *)machine_host(vm, GUEST_GDT);
    const uint16_t bitmap_at = TSS_HEAD;

    gdt[1] = 0x00af9b000000ffff;                        /* kernel code, 64 bits: for interrupts */
    gdt[CODE_SELECTOR / 8] = 0x00affb000000ffff;        /* user code, 64 bits */
    gdt[DATA_SELECTOR / 8] = 0x00cff3000000ffff;        /* user data */
    gdt[TSS_SELECTOR / 8] = (uint64_t)(TSS_BYTES - 1) | (uint64_t)GUEST_TSS << 16 | 0x8bull << 40;
    for (uint64_t i = 0; i < vm->vcpus; i++) {
        uint8_t *tss = machine_host(vm, GUEST_TSS + i * GUEST_TSS_STRIDE);
        uint64_t stack = GUEST_INTERRUPTS + i * GUEST_INTERRUPT_STRIDE + GUEST_INTERRUPT_COUNTS;
        memset(tss, 0, TSS_BYTES);                      /* the bitmap: every port allowed */
        memcpy(tss + 4, &stack, sizeof stack);
        memcpy(tss + 102, &bitmap_at, sizeof bitmap_at);
    }
}

/* x87, SSE and, where the host has it, AVX state for the guest to use. */
static bool vcpu_enable_avx(struct vcpu *vcpu)
{
    struct kvm_xcrs xcrs = { .nr_xcrs = 1, .xcrs = { { .xcr = 0, .value = 7 } } };

    return ioctl(vcpu->fd, KVM_SET_XCRS, &xcrs) == 0;
}

static int vcpu_boot(struct vcpu *vcpu)
{
    struct kvm_segment data = { .limit = UINT32_MAX, .selector = DATA_SELECTOR, .type = 3, .present = 1, .dpl = 3,
                                .db = 1, .s = 1, .g = 1 };
    struct kvm_mp_state running = { .mp_state = KVM_MP_STATE_RUNNABLE };
    struct kvm_regs regs = { .rip = GUEST_IMAGE, .rflags = 0x202, .rdi = vcpu->index };
    struct kvm_sregs sregs;

    if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0)
        return -errno;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cs = data;
    sregs.cs.selector = CODE_SELECTOR, sregs.cs.type = 0xb, sregs.cs.db = 0, sregs.cs.l = 1;
    sregs.tr = (struct kvm_segment){ .base = GUEST_TSS + vcpu->index * GUEST_TSS_STRIDE, .limit = TSS_BYTES - 1,
                                     .selector = TSS_SELECTOR, .type = 0xb, .present = 1 };
    sregs.gdt.base = GUEST_GDT, sregs.gdt.limit = GDT_BYTES - 1;
    /* No gates but for interrupts: any exception is a triple fault, and so a loud exit. */
    sregs.idt.base = GUEST_IDT, sregs.idt.limit = GUEST_VECTORS * 16 - 1;
    sregs.cr0 = 0x80050033, sregs.cr3 = GUEST_PAGE_TABLES, sregs.cr4 = 0x40620, sregs.efer = 0x500;
    regs.rsp = GUEST_STACKS + (vcpu->index + 1ull) * GUEST_STACK_SIZE - 8;      /* as after a call */
    if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) < 0 || ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0 ||
        ioctl(vcpu->fd, KVM_SET_MP_STATE, &running) < 0)
        return -errno;
    return 0;
}

int machine_boot(struct machine *vm, const struct boot_info *knobs, enum machine_fill fill, unsigned tick_us)
{
    struct boot_info boot = *knobs;
    int err, tsc_khz = ioctl(vm->vcpu[0].fd, KVM_GET_TSC_KHZ, 0ul);

    if (tsc_khz <= 0)
        return tsc_khz < 0 ? -errno : -ENOTSUP;
    fill_ram(vm, fill);
    write_page_tables(vm);
    write_descriptors(vm);
    memcpy(machine_host(vm, GUEST_IMAGE), guest_image, (size_t)(guest_image_end - guest_image));
    boot.low_end = vm->ram[0].len;
    boot.high_end = GUEST_HIGH_BASE + vm->ram[1].len;
    boot.tick_tsc = (uint64_t)tsc_khz * tick_us / 1000;
    boot.ticker_us = tick_us;
    boot.vcpus = (uint32_t)vm->vcpus;
    boot.avx = 1;
    boot.stamped = fill == FILL_PATTERN || fill == FILL_RANDOM;
    for (size_t i = 0; i < vm->vcpus; i++) {
        if ((err = vcpu_boot(&vm->vcpu[i])) < 0)
            return err;
        boot.avx &= vcpu_enable_avx(&vm->vcpu[i]);
    }
    memcpy(machine_host(vm, GUEST_BOOT_INFO), &boot, sizeof boot);
    return 0;
}
