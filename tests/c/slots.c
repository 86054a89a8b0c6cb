/* A KVM VMM whose RAM is shown through slots in awkward ways, and which can change them behind the library's back.
 *                                                                                       SPDX: MIT OR Apache-2.0
 *   slots [hook] [incoming] [ring=ENTRIES] [gate] [manual]
 *     hook      switch logging by the hook log_dirty, else the library does it
 *     gate      no logic to pause the vCPU, which goes through the library's gate
 *     manual    one thread besides the vCPU's, and all callbacks on it
 *
 * The guest runs in ring 3 and increments words all over its RAM. Commands: see program.h and own_command(). Exit status
 * 77: there is no usable KVM here. */
#include "program.h"
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>

enum { PAGE = 4096, LOW_PAGES = 512, MAIN_PAGES = 6144, ROM_PAGES = 16, SLOTS = 6, BLOCKS = 3, ODD = 37 };
enum { GDT = 0x1000, TSS = 0x3000, TSS_HEAD = 104, TSS_BYTES = TSS_HEAD + 8193, TABLES = 0x10000, CODE = 0x100000 };
#define MAIN_GPA 0x200000ull            /* where the guest sees "main", through slots 1 to 3 */
#define ALIAS_GPA 0x4000000ull          /* and again, from page ODD on, through slot 4 */
#define ROM_GPA 0x8000000ull

struct block {
    const char *name;
    uint64_t pages, gpa;
    uint8_t *host;
};
struct slot {
    uint32_t block, flags;
    uint64_t first, pages, gpa;         /* pages of the block */
};
struct machine {
    vmig *m;
    int kvm, vm, vcpu;
    struct kvm_run *run;
    struct block block[BLOCKS];
    struct slot slot[SLOTS];
    pthread_t thread, home;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool go, parked, quit, hook, manual;
    vmig_gate *gate;
    uint64_t ring;
    _Atomic uint64_t batches, switched, full, stops;
};

/* rdi: base, rsi: pages of the main view, r9: base of the alias, r10: pages there; rax: random; rbx, r8: constants. */
__asm__(".pushsection .rodata\n"
        "guest_code:\n"
        "1: mov $2048, %edx\n"
        "2: imul %rbx, %rax\n"
        "   add %r8, %rax\n"
        "   mov %rax, %rcx\n"
        "   shr $40, %rcx\n"
        "   mov %rdi, %r11\n"
        "   mov %rsi, %r12\n"
        "   test $0x80000000, %eax\n"
        "   jz 3f\n"
        "   mov %r9, %r11\n"
        "   mov %r10, %r12\n"
        "3: mov %rax, %r13\n"
        "   mov %edx, %r14d\n"
        "   mov %rcx, %rax\n"
        "   xor %edx, %edx\n"
        "   div %r12\n"
        "   mov %rdx, %rcx\n"
        "   mov %r13, %rax\n"
        "   mov %r14d, %edx\n"
        "   shl $12, %rcx\n"
        "   incq (%r11,%rcx)\n"
        "   dec %edx\n"
        "   jnz 2b\n"
        "   out %al, $0x70\n"
        "   jmp 1b\n"
        "guest_code_end:\n"
        ".popsection\n");
extern const uint8_t guest_code[], guest_code_end[];

static void die(const char *what)
{
    fprintf(stderr, "slots: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int set_slot(struct machine *vm, uint32_t number, uint64_t pages, uint32_t logging)
{
    struct slot *s = &vm->slot[number];
    struct kvm_userspace_memory_region region = {
        .slot = number, .flags = s->flags | logging, .guest_phys_addr = s->gpa, .memory_size = pages * PAGE,
        .userspace_addr = (uintptr_t)(vm->block[s->block].host + s->first * PAGE),
    };

    if (ioctl(vm->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        return -errno;
    return 0;
}

/* ---- the guest ---- */

static void park_or_go(struct machine *vm)
{
    pthread_mutex_lock(&vm->lock);
    while (!vm->go && !vm->quit && !vm->gate) {
        vm->parked = true;
        pthread_cond_broadcast(&vm->changed);
        pthread_cond_wait(&vm->changed, &vm->lock);
    }
    vm->parked = false;
    __atomic_store_n(&vm->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&vm->lock);
}

/* A slot that is smaller than it was leaves pages the guest still writes: done here, and reported. */
static void emulate_write(struct machine *vm)
{
    uint64_t gpa = vm->run->mmio.phys_addr;

    for (size_t i = 0; i < SLOTS; i++) {
        const struct slot *s = &vm->slot[i];
        uint8_t *at = vm->block[s->block].host + s->first * PAGE + (gpa - s->gpa);
        if (gpa < s->gpa || gpa - s->gpa >= s->pages * PAGE)
            continue;
        if (vm->run->mmio.is_write) {
            memcpy(at, vm->run->mmio.data, vm->run->mmio.len);
            vmig_dirty(vm->m, at, vm->run->mmio.len);
        } else {
            memcpy(vm->run->mmio.data, at, vm->run->mmio.len);
        }
        return;
    }
    fprintf(stderr, "slots: the guest is lost at 0x%" PRIx64 "\n", gpa);
    _exit(3);
}

/* Until the run is interrupted: by a signal, or by immediate_exit, which completes what the guest was at. */
static void run_guest(struct machine *vm)
{
    for (;;) {
        if (ioctl(vm->vcpu, KVM_RUN, 0) < 0) {
            if (errno != EINTR && errno != EAGAIN)
                die("KVM_RUN");
            return;
        } else if (vm->run->exit_reason == KVM_EXIT_IO) {
            vm->batches++;
        } else if (vm->run->exit_reason == KVM_EXIT_DIRTY_RING_FULL) {
            vm->full++;
            need(vmig_dirty_ring_full(vm->m, 0), "vmig_dirty_ring_full");
        } else if (vm->run->exit_reason == KVM_EXIT_MMIO) {
            emulate_write(vm);
        } else {
            fprintf(stderr, "slots: unexpected exit %" PRIu32 "\n", vm->run->exit_reason);
            _exit(3);
        }
    }
}

static void *vcpu_thread(void *opaque)
{
    struct machine *vm = opaque;

    while (vm->gate && vmig_gate_enter(vm->gate, 0, &vm->run->immediate_exit) == 0) {
        run_guest(vm);
        need(vmig_gate_exit(vm->gate, 0), "vmig_gate_exit");
    }
    for (park_or_go(vm); !vm->gate && !vm->quit; park_or_go(vm))
        run_guest(vm);
    return NULL;
}

static void pause_vcpu(struct machine *vm)
{
    if (vm->gate) {
        need(vmig_gate_close(vm->gate), "vmig_gate_close");
        return;
    }
    pthread_mutex_lock(&vm->lock);
    vm->go = false;
    __atomic_store_n(&vm->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    pthread_kill(vm->thread, SIGUSR1);
    while (!vm->parked)
        pthread_cond_wait(&vm->changed, &vm->lock);
    pthread_mutex_unlock(&vm->lock);
}

static void resume_vcpu(struct machine *vm)
{
    if (vm->gate) {
        need(vmig_gate_open(vm->gate), "vmig_gate_open");
        return;
    }
    pthread_mutex_lock(&vm->lock);
    vm->go = true;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
}

static void on_kick(int signal)
{
    (void)signal;                       /* its only work is to interrupt KVM_RUN */
}

/* ---- making the machine ---- */

static void write_tables(struct machine *vm)
{
    uint8_t *low = vm->block[0].host;
    uint64_t *pml4 = (void *)(low + TABLES), *pdpt = pml4 + 512, *directory = pdpt + 512, *gdt = (void *)(low + GDT);
    const uint16_t bitmap_at = TSS_HEAD;

    pml4[0] = (TABLES + PAGE) | 0x27;
    pdpt[0] = (TABLES + 2 * PAGE) | 0x27;
    for (uint64_t i = 0; i < 512; i++)
        directory[i] = i << 21 | 0xe7;  /* present, writable, user, accessed, dirty, 2 MiB */
    gdt[4] = 0x00affb000000ffff, gdt[5] = 0x00cff3000000ffff;
    gdt[6] = (uint64_t)(TSS_BYTES - 1) | (uint64_t)TSS << 16 | 0x8bull << 40;
    memcpy(low + TSS + 102, &bitmap_at, sizeof bitmap_at);
    memcpy(low + CODE, guest_code, (size_t)(guest_code_end - guest_code));
}

static void boot(struct machine *vm)
{
    struct kvm_segment data = { .limit = UINT32_MAX, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .db = 1,
                                .s = 1, .g = 1 };
    struct kvm_regs regs = { .rip = CODE, .rflags = 2, .rdi = MAIN_GPA, .rsi = MAIN_PAGES, .r9 = ALIAS_GPA,
                             .r10 = vm->slot[4].pages, .rbx = 6364136223846793005, .r8 = 1442695040888963407 };
    struct kvm_sregs sregs;

    write_tables(vm);
    for (uint64_t i = 0; i < MAIN_PAGES; i++)
        *(uint64_t *)(void *)(vm->block[1].host + i * PAGE + 8) = i + 1;
    memset(vm->block[2].host, 0x5a, ROM_PAGES * PAGE);
    if (ioctl(vm->vcpu, KVM_GET_SREGS, &sregs) < 0)
        die("KVM_GET_SREGS");
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = sregs.cs = data;
    sregs.cs.selector = 0x23, sregs.cs.type = 0xb, sregs.cs.db = 0, sregs.cs.l = 1;
    sregs.tr = (struct kvm_segment){ .base = TSS, .limit = TSS_BYTES - 1, .selector = 0x30, .type = 0xb, .present = 1 };
    sregs.gdt.base = GDT, sregs.gdt.limit = 0x3f, sregs.idt.limit = 0;
    sregs.cr0 = 0x80050033, sregs.cr3 = TABLES, sregs.cr4 = 0x20, sregs.efer = 0x500;
    if (ioctl(vm->vcpu, KVM_SET_SREGS, &sregs) < 0 || ioctl(vm->vcpu, KVM_SET_REGS, &regs) < 0)
        die("booting");
}

/* Before any vCPU. */
static void enable_ring(struct machine *vm)
{
    struct kvm_enable_cap cap = { .cap = KVM_CAP_DIRTY_LOG_RING, .args = { vm->ring * sizeof(struct kvm_dirty_gfn) } };

    if (vm->ring && ioctl(vm->vm, KVM_ENABLE_CAP, &cap) < 0) {
        perror("KVM_CAP_DIRTY_LOG_RING");
        exit(77);
    }
}

static void make_vm(struct machine *vm)
{
    unsigned long tss = 0xfffbd000;
    int size;

    vm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (vm->kvm < 0) {
        perror("/dev/kvm");
        exit(77);
    }
    if ((vm->vm = ioctl(vm->kvm, KVM_CREATE_VM, 0ul)) < 0 || ioctl(vm->vm, KVM_SET_TSS_ADDR, tss) < 0)
        die("making a VM");
    enable_ring(vm);
    if ((vm->vcpu = ioctl(vm->vm, KVM_CREATE_VCPU, 0ul)) < 0 ||
        (size = ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0ul)) < 0)
        die("making a VM");
    vm->run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu, 0);
    if (vm->run == MAP_FAILED)
        die("mmap of a vCPU");
}

/* "main" is cut at pages that are no multiple of 64, is seen twice in part, and ends with the rest of a group. */
static void make_ram(struct machine *vm)
{
    static const struct block blocks[BLOCKS] = {
        { "low", LOW_PAGES, 0, NULL }, { "main", MAIN_PAGES, MAIN_GPA, NULL }, { "rom", ROM_PAGES, ROM_GPA, NULL },
    };
    const uint64_t second = ODD, third = 64 * 33 + 5;

    unmap_hole(NULL, 0);
    for (size_t i = 0; i < BLOCKS; i++) {
        vm->block[i] = blocks[i];
        vm->block[i].host = map_ram(blocks[i].pages * PAGE);
    }
    vm->slot[0] = (struct slot){ .block = 0, .pages = LOW_PAGES, .gpa = 0 };
    vm->slot[1] = (struct slot){ .block = 1, .first = 0, .pages = second };
    vm->slot[2] = (struct slot){ .block = 1, .first = second, .pages = third - second };
    vm->slot[3] = (struct slot){ .block = 1, .first = third, .pages = MAIN_PAGES - third };
    for (size_t i = 1; i <= 3; i++)
        vm->slot[i].gpa = MAIN_GPA + vm->slot[i].first * PAGE;
    vm->slot[4] = (struct slot){ .block = 1, .first = ODD, .pages = 64 * 20 + 11, .gpa = ALIAS_GPA };
    vm->slot[5] = (struct slot){ .block = 2, .pages = ROM_PAGES, .gpa = ROM_GPA, .flags = KVM_MEM_READONLY };
    for (uint32_t i = 0; i < SLOTS; i++)
        if (set_slot(vm, i, vm->slot[i].pages, 0) < 0)
            die("KVM_SET_USER_MEMORY_REGION");
}

/* ---- what the library calls ---- */

static int stop(void *opaque)
{
    struct machine *vm = opaque;

    if (!vm->gate)
        pause_vcpu(vm);
    vm->stops++;
    return 0;
}

static uint64_t hash_ram(const struct machine *vm)
{
    uint64_t hash = 0;

    for (size_t i = 0; i < BLOCKS; i++)
        hash = hash * 31 + hash_bytes(vm->block[i].host, vm->block[i].pages * PAGE);
    return hash;
}

static int start(void *opaque)
{
    struct machine *vm = opaque;

    printf("hashed %" PRIx64 "\n", hash_ram(vm));
    if (!vm->gate)
        resume_vcpu(vm);
    return 0;
}

/* What a VMM may do that sets a slot while no vCPU runs. */
static void ask_and_wait(struct machine *vm)
{
    vmig_vcpu_dirt dirt = VMIG_SIZED(vmig_vcpu_dirt);
    bool ran = vm->go;

    if (ran)
        pause_vcpu(vm);
    need(vmig_get_vcpu_dirt(vm->m, 0, &dirt), "vmig_get_vcpu_dirt");
    if (ran)
        resume_vcpu(vm);
}

static int log_dirty(void *opaque, uint32_t slot, int on)
{
    struct machine *vm = opaque;

    vm->switched++;
    if (vm->manual && !pthread_equal(pthread_self(), vm->home))
        _exit(3);
    if (!on && vm->ring)
        ask_and_wait(vm);
    return slot < SLOTS ? set_slot(vm, slot, vm->slot[slot].pages, on ? KVM_MEM_LOG_DIRTY_PAGES : 0) : -EINVAL;
}

static int register_slot(struct machine *vm, uint32_t number)
{
    const struct slot *s = &vm->slot[number];
    vmig_kvm_slot slot = VMIG_SIZED(vmig_kvm_slot);

    slot.slot = number, slot.flags = s->flags, slot.ram = vm->block[s->block].name, slot.offset = s->first * PAGE;
    slot.len = s->pages * PAGE, slot.gpa = s->gpa;
    return vmig_add_kvm_slot(vm->m, &slot);
}

static void register_all(struct machine *vm)
{
    vmig_bql_lock(vm->m);
    need(vmig_use_kvm(vm->m, vm->vm, &vm->vcpu, 1), "vmig_use_kvm");
    for (size_t i = 0; i < BLOCKS; i++) {
        vmig_ram ram = VMIG_SIZED(vmig_ram);
        ram.name = vm->block[i].name, ram.host = vm->block[i].host, ram.len = vm->block[i].pages * PAGE;
        ram.gpa = vm->block[i].gpa;
        need(vmig_add_ram(vm->m, &ram), "vmig_add_ram");
    }
    for (uint32_t i = 0; i < SLOTS; i++)
        need(register_slot(vm, i), "vmig_add_kvm_slot");
    vmig_bql_unlock(vm->m);
}

/* ---- commands ---- */

/* Deletes a slot and makes it anew with so many pages, while no vCPU runs: what a VMM that moves a BAR does. */
static int again(struct machine *vm, uint32_t number, uint64_t pages, uint32_t logging)
{
    bool ran = vm->go;
    int err;

    if (ran)
        pause_vcpu(vm);
    (void)set_slot(vm, number, 0, 0);   /* it may be gone already */
    err = pages ? set_slot(vm, number, pages, logging) : 0;
    if (ran)
        resume_vcpu(vm);
    return err;
}

/* "off N": set without logging. "again N", "smaller N", "larger N", "gone N": deleted, and made anew with logging. */
static int tamper(struct machine *vm, const char *how, uint32_t number)
{
    struct slot *s = &vm->slot[number];

    if (strcmp(how, "off") == 0)
        return set_slot(vm, number, s->pages, 0);
    if (strcmp(how, "again") == 0)
        return again(vm, number, s->pages, KVM_MEM_LOG_DIRTY_PAGES);
    if (strcmp(how, "smaller") == 0)
        return again(vm, number, s->pages - 70, KVM_MEM_LOG_DIRTY_PAGES);
    if (strcmp(how, "larger") == 0)
        return again(vm, number, s->pages + 70, KVM_MEM_LOG_DIRTY_PAGES);
    if (strcmp(how, "gone") == 0)
        return again(vm, number, 0, 0);
    return strcmp(how, "back") == 0 ? again(vm, number, s->pages, 0) : -EINVAL;
}

/* "off" when KVM keeps no dirty log of any slot. */
static void answer_logging(struct machine *vm)
{
    static uint64_t bits[MAIN_PAGES / 64 + 64];
    unsigned on = 0;

    for (uint32_t i = 0; i < SLOTS; i++) {
        struct kvm_dirty_log log = { .slot = i, .dirty_bitmap = bits };
        on += ioctl(vm->vm, KVM_GET_DIRTY_LOG, &log) == 0 || errno != ENOENT;
    }
    printf("logging %s\n", on ? "on" : "off");
}

/* Whether KVM still has a slot: only one that is there can be set again with another address, which it refuses. */
static bool present(struct machine *vm, uint32_t number)
{
    const struct slot *s = &vm->slot[number];
    struct kvm_userspace_memory_region region = {
        .slot = number, .flags = s->flags, .guest_phys_addr = s->gpa, .memory_size = 2 * PAGE,
        .userspace_addr = (uintptr_t)vm->block[0].host,
    };

    if (ioctl(vm->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        return errno == EINVAL;
    region.memory_size = 0;
    ioctl(vm->vm, KVM_SET_USER_MEMORY_REGION, &region);
    return false;
}

static int unregister(struct machine *vm, uint32_t number, bool back)
{
    int err;

    vmig_bql_lock(vm->m);
    err = back ? register_slot(vm, number) : vmig_remove_kvm_slot(vm->m, number);
    vmig_bql_unlock(vm->m);
    return err;
}

static bool own_command(void *opaque, const char *verb, char *rest)
{
    struct machine *vm = opaque;
    uint32_t number = rest ? (uint32_t)strtoul(rest, NULL, 10) % SLOTS : 0;

    if (strcmp(verb, "hash") == 0) {
        printf("hash %" PRIx64 "\n", hash_ram(vm));
    } else if (strcmp(verb, "batches") == 0) {
        printf("batches %" PRIu64 "\n", vm->batches);
    } else if (strcmp(verb, "switched") == 0) {
        printf("switched %" PRIu64 "\n", vm->switched);
    } else if (strcmp(verb, "stops") == 0) {
        printf("stops %" PRIu64 "\n", vm->stops);
    } else if (strcmp(verb, "full") == 0) {
        printf("full %" PRIu64 "\n", vm->full);
    } else if (strcmp(verb, "limit") == 0 && rest) {    /* bytes per second that the vCPU may dirty */
        answer(verb, vmig_set_vcpu_dirty_limit(vm->m, *rest == '-' ? -1 : 0, strtoull(rest + (*rest == '-'), NULL, 10)));
    } else if (strcmp(verb, "dirt") == 0) {
        vmig_vcpu_dirt dirt = VMIG_SIZED(vmig_vcpu_dirt);
        need(vmig_get_vcpu_dirt(vm->m, 0, &dirt), "vmig_get_vcpu_dirt");
        printf("dirt limit=%" PRIu64 " rate=%" PRIu64 " throttle=%" PRIu64 "\n", dirt.limit, dirt.rate, dirt.throttle);
    } else if (strcmp(verb, "listen") == 0 && rest) {
        answer(verb, vmig_qmp_listen(vm->m, rest));
    } else if (strcmp(verb, "tracker") == 0) {
        answer_text(vmig_get(vm->m, "dirty-tracker-in-use"));
    } else if (strcmp(verb, "logging") == 0) {
        answer_logging(vm);
    } else if (strcmp(verb, "present") == 0) {
        printf("present %s\n", present(vm, number) ? "yes" : "no");
    } else if (strcmp(verb, "flash") == 0) {            /* the VMM writes what the guest may only read */
        memset(vm->block[2].host + 3 * PAGE, (int)number + 1, PAGE);
        vmig_dirty(vm->m, vm->block[2].host + 3 * PAGE, PAGE);
        printf("ok\n");
    } else if (strcmp(verb, "unmap") == 0) {            /* the second half of "rom", at which nobody looks */
        vm->block[2].pages = ROM_PAGES / 2;
        unmap_hole(vm->block[2].host + ROM_PAGES / 2 * PAGE, ROM_PAGES / 2 * PAGE);
        printf("ok\n");
    } else if (strcmp(verb, "forget") == 0 || strcmp(verb, "register") == 0) {
        answer(verb, unregister(vm, number, *verb == 'r'));
    } else {
        int err = tamper(vm, verb, number);
        if (err == -EINVAL)
            return false;
        printf(err < 0 ? "error %s: %s\n" : "ok\n", verb, strerror(-err));
    }
    return true;
}

static bool understands(struct machine *vm, const char *word, bool *arrives, bool *gated)
{
    const struct { const char *word; bool *is; } flags[] = {
        { "hook", &vm->hook }, { "manual", &vm->manual }, { "incoming", arrives }, { "gate", gated },
    };

    if (strncmp(word, "ring=", 5) == 0)
        return (vm->ring = strtoull(word + 5, NULL, 10)) > 0;
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        if (strcmp(word, flags[i].word) == 0)
            return *flags[i].is = true;
    return false;
}

static void make_gate(struct machine *vm)
{
    vmig_gate_config config = VMIG_SIZED(vmig_gate_config);

    config.vcpus = 1, config.signal = SIGUSR1, config.timeout_ms = 60000;      /* its handler is ours */
    need(vmig_gate_new(&config, &vm->gate), "vmig_gate_new");
}

/* The guest is stopped for good. */
static void end_vcpu(struct machine *vm)
{
    if (vm->gate)
        need(vmig_gate_end(vm->gate), "vmig_gate_end");
    else
        pause_vcpu(vm);
    pthread_mutex_lock(&vm->lock);
    vm->quit = true;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
    pthread_join(vm->thread, NULL);
}

int main(int argc, char **argv)
{
    static struct machine vm = { .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };
    struct sigaction kick = { .sa_handler = on_kick };
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    bool arrives = false, gated = false;

    for (int i = 1; i < argc; i++)
        if (!understands(&vm, argv[i], &arrives, &gated))
            return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    sigaction(SIGUSR1, &kick, NULL);
    vm.home = pthread_self();
    make_vm(&vm);
    make_ram(&vm);
    if (!arrives)
        boot(&vm);
    if (gated)
        make_gate(&vm);
    ops.stop = stop, ops.start = start, ops.log_dirty = vm.hook ? log_dirty : NULL, ops.gate = vm.gate;
    need(vmig_new(&ops, &vm, &vm.m), "vmig_new");
    if (vm.manual)
        need(vmig_set(vm.m, "dispatch", "manual"), "dispatch=manual");
    register_all(&vm);
    if (pthread_create(&vm.thread, NULL, vcpu_thread, &vm))
        return 1;
    if (!arrives)
        need(vmig_start(vm.m), "vmig_start");
    printf("ready\n");
    if (vm.manual)
        while (serve_some(vm.m, own_command, &vm, -1))
            continue;
    else
        serve(vm.m, own_command, &vm);
    end_vcpu(&vm);
    vmig_free(vm.m);
    vmig_gate_free(vm.gate);
    printf("freed: ");
    answer_logging(&vm);
    return 0;
}
