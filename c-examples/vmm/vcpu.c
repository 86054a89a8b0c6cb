/* vCPU threads: run the guest, handle its exits, pause between two instructions.        SPDX: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "vmm.h"
#include <errno.h>
#include <inttypes.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { KICK_SIGNAL = SIGUSR1, PAUSE_TIMEOUT_S = 5, NAP_MAX_US = 100000 };

static struct timespec deadline_in(uint64_t ns)
{
    uint64_t at = now_ns() + ns;

    return (struct timespec){ .tv_sec = (time_t)(at / 1000000000), .tv_nsec = (long)(at % 1000000000) };
}

/* Ring 3's halt: sleep until the time is over or somebody wants this vCPU to pause. */
static void vcpu_nap(struct vcpu *vcpu, uint32_t us)
{
    struct machine *vm = vcpu->vm;
    struct timespec until = deadline_in((us < NAP_MAX_US ? us : NAP_MAX_US) * 1000ull);

    pthread_mutex_lock(&vm->run_lock);
    while (!vm->paused && !vm->quit &&
           pthread_cond_timedwait(&vm->run_changed, &vm->run_lock, &until) != ETIMEDOUT)
        continue;
    pthread_mutex_unlock(&vm->run_lock);
}

static void vcpu_io(struct vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    uint8_t *data = (uint8_t *)run + run->io.data_offset;

    for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size) {
        uint32_t value = 0;
        if (run->io.direction == KVM_EXIT_IO_IN) {
            value = port_in(vcpu, run->io.port, run->io.size);
            memcpy(data, &value, run->io.size);
            continue;
        }
        memcpy(&value, data, run->io.size);
        if (run->io.port == PORT_NAP)
            vcpu_nap(vcpu, value);
        else
            port_out(vcpu, run->io.port, run->io.size, value);
    }
}

static void vcpu_unexpected(struct vcpu *vcpu)
{
    struct kvm_regs regs = { 0 };

    ioctl(vcpu->fd, KVM_GET_REGS, &regs);
    machine_die(EXIT_VMM_FAULT, "vCPU %u: unexpected exit %" PRIu32 " (%s) at rip 0x%llx, rsp 0x%llx", vcpu->index,
                vcpu->run->exit_reason, vcpu->run->exit_reason == KVM_EXIT_SHUTDOWN ? "triple fault" : "see linux/kvm.h",
                regs.rip, regs.rsp);
}

/* Runs until an exit, handles it; false when KVM_RUN was interrupted before or between guest instructions. */
static bool vcpu_step(struct vcpu *vcpu)
{
    if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
        if (errno == EINTR || errno == EAGAIN)
            return false;
        machine_die(EXIT_VMM_FAULT, "vCPU %u: KVM_RUN: %s", vcpu->index, strerror(errno));
    }
    if (vcpu->run->exit_reason == KVM_EXIT_IO)
        vcpu_io(vcpu);
    else if (vcpu->run->exit_reason == KVM_EXIT_DIRTY_RING_FULL)
        migrate_ring_full(vcpu->vm, vcpu->index);
    else
        vcpu_unexpected(vcpu);
    return true;
}

static void vcpu_ask_to_exit(struct vcpu *vcpu, bool ask)
{
    __atomic_store_n(&vcpu->run->immediate_exit, ask, __ATOMIC_SEQ_CST);
}

/* Where a vCPU waits while the machine is paused or slowed down; false when it shall end. The request to exit is taken back only
 * here and only under the lock that pausing takes, so a kick that comes at any moment is never lost. */
static bool vcpu_gate(struct vcpu *vcpu)
{
    struct machine *vm = vcpu->vm;
    bool go_on;

    pthread_mutex_lock(&vm->run_lock);
    while ((vm->paused || vm->napping) && !vm->quit) {
        if (vm->paused && !vcpu->parked) {               /* said once: parked vCPUs must not wake each other */
            vcpu->parked = true;
            pthread_cond_broadcast(&vm->run_changed);
        }
        pthread_cond_wait(&vm->run_changed, &vm->run_lock);
    }
    vcpu->parked = false;
    vcpu_ask_to_exit(vcpu, false);
    go_on = !vm->quit;
    pthread_mutex_unlock(&vm->run_lock);
    return go_on;
}

/* To the gate only from an interrupted KVM_RUN: an instruction whose exit we handled is completed by the next
 * KVM_RUN, so a vCPU that parked right after an exit would carry half an IN away. */
static void *vcpu_thread(void *opaque)
{
    struct vcpu *vcpu = opaque;

    while (vcpu_gate(vcpu))
        while (vcpu_step(vcpu))
            continue;
    return NULL;
}

static void kick(struct machine *vm)                     /* run_lock held */
{
    for (size_t i = 0; i < vm->vcpus; i++) {
        vcpu_ask_to_exit(&vm->vcpu[i], true);            /* for one that is about to enter the guest */
        if (vm->vcpu[i].has_thread)
            pthread_kill(vm->vcpu[i].thread, KICK_SIGNAL);      /* for one that is inside */
    }
    pthread_cond_broadcast(&vm->run_changed);            /* for one that naps */
}

static const struct vcpu *first_running(const struct machine *vm)
{
    for (size_t i = 0; i < vm->vcpus; i++)
        if (vm->vcpu[i].has_thread && !vm->vcpu[i].parked)
            return &vm->vcpu[i];
    return NULL;
}

int machine_pause(struct machine *vm)
{
    struct timespec until = deadline_in(PAUSE_TIMEOUT_S * 1000000000ull);
    const struct vcpu *late;
    int err = 0;

    pthread_mutex_lock(&vm->run_lock);
    vm->paused = true;
    kick(vm);
    while ((late = first_running(vm)) && err == 0)
        err = pthread_cond_timedwait(&vm->run_changed, &vm->run_lock, &until);
    pthread_mutex_unlock(&vm->run_lock);
    if (late) {
        fprintf(stderr, "vmm: vCPU %u did not pause within %d s\n", late->index, PAUSE_TIMEOUT_S);
        machine_resume(vm);
        return -ETIMEDOUT;
    }
    ticker_run(vm, false);
    return 0;
}

/* Waits, with the lock held, unless the machine's speed changes. */
static void keep_speed(struct machine *vm, unsigned percent, uint64_t ns)
{
    struct timespec until = deadline_in(ns);

    while (vm->throttle == percent && !vm->quit &&
           pthread_cond_timedwait(&vm->run_changed, &vm->run_lock, &until) != ETIMEDOUT)
        continue;
}

/* The thread "throttle": lets the vCPUs run for a while and stand still for a while, in turn. */
static void *throttle_thread(void *opaque)
{
    const uint64_t slice_ns = 10000000;
    struct machine *vm = opaque;

    pthread_mutex_lock(&vm->run_lock);
    while (!vm->quit) {
        unsigned percent = vm->throttle;
        if (percent == 0) {
            pthread_cond_wait(&vm->run_changed, &vm->run_lock);
            continue;
        }
        keep_speed(vm, percent, slice_ns);
        vm->napping = vm->throttle == percent;
        if (vm->napping) {
            kick(vm);
            keep_speed(vm, percent, slice_ns * percent / (100 - percent));
            vm->napping = false;
            pthread_cond_broadcast(&vm->run_changed);
        }
    }
    pthread_mutex_unlock(&vm->run_lock);
    return NULL;
}

void machine_throttle(struct machine *vm, unsigned percent)
{
    pthread_mutex_lock(&vm->run_lock);
    vm->throttle = percent;
    pthread_cond_broadcast(&vm->run_changed);
    pthread_mutex_unlock(&vm->run_lock);
}

int machine_resume(struct machine *vm)
{
    ticker_run(vm, true);
    pthread_mutex_lock(&vm->run_lock);
    vm->paused = false;
    pthread_cond_broadcast(&vm->run_changed);
    pthread_mutex_unlock(&vm->run_lock);
    return 0;
}

/* ---- making them ---- */

static void hide(struct kvm_cpuid_entry2 *e, const struct cpu_config *cpu)
{
    uint32_t *registers[] = { &e->eax, &e->ebx, &e->ecx, &e->edx };

    if (cpu->hides && e->function == cpu->hidden[0] && e->index == cpu->hidden[1])
        *registers[cpu->hidden[2]] &= ~(1u << cpu->hidden[3]);
}

static int set_cpuid(struct machine *vm, struct vcpu *vcpu, const struct cpu_config *cpu)
{
    enum { ENTRIES = 256 };
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + ENTRIES * sizeof cpuid->entries[0]);
    int err = 0;

    if (!cpuid)
        return -ENOMEM;
    cpuid->nent = ENTRIES;
    if (ioctl(vm->kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid) < 0)
        err = -errno;
    for (uint32_t i = 0; !err && i < cpuid->nent; i++) {        /* the host's APIC id means nothing to the guest */
        struct kvm_cpuid_entry2 *e = &cpuid->entries[i];
        if (e->function == 1)
            e->ebx = (e->ebx & 0x00ffffff) | vcpu->index << 24;
        else if (e->function == 0xb || e->function == 0x1f)
            e->edx = vcpu->index;
        hide(e, cpu);
    }
    if (!err && ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid) < 0)
        err = -errno;
    free(cpuid);
    return err;
}

int vcpu_create(struct machine *vm, unsigned index, const struct cpu_config *cpu)
{
    struct vcpu *vcpu = &vm->vcpu[index];

    vcpu->vm = vm;
    vcpu->index = index;
    vcpu->fd = ioctl(vm->vm_fd, KVM_CREATE_VCPU, (unsigned long)index);
    if (vcpu->fd < 0)
        return -errno;
    vcpu->run = mmap(NULL, vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (vcpu->run == MAP_FAILED) {
        vcpu->run = NULL;
        return -errno;
    }
    if (cpu->tsc_khz && ioctl(vcpu->fd, KVM_SET_TSC_KHZ, (unsigned long)cpu->tsc_khz) < 0)
        return -errno;
    return set_cpuid(vm, vcpu, cpu);
}

static void on_kick(int signal)
{
    (void)signal;                                       /* its only work is to interrupt KVM_RUN */
}

int vcpus_start_threads(struct machine *vm)
{
    struct sigaction action = { .sa_handler = on_kick };
    char name[16];
    int err = 0;

    sigaction(KICK_SIGNAL, &action, NULL);
    for (size_t i = 0; i < vm->vcpus && !err; i++) {
        err = -pthread_create(&vm->vcpu[i].thread, NULL, vcpu_thread, &vm->vcpu[i]);
        snprintf(name, sizeof name, "vcpu %u", vm->vcpu[i].index);
        if (!err)
            pthread_setname_np(vm->vcpu[i].thread, name);       /* tools tell the guest's time from ours by it */
        pthread_mutex_lock(&vm->run_lock);
        vm->vcpu[i].has_thread = !err;
        pthread_mutex_unlock(&vm->run_lock);
    }
    if (!err && (err = -pthread_create(&vm->throttler, NULL, throttle_thread, vm)) == 0) {
        pthread_setname_np(vm->throttler, "throttle");
        vm->has_throttler = true;
    }
    return err;
}

void vcpus_end_threads(struct machine *vm)
{
    pthread_mutex_lock(&vm->run_lock);
    vm->quit = true;
    kick(vm);
    pthread_mutex_unlock(&vm->run_lock);
    if (vm->has_throttler)
        pthread_join(vm->throttler, NULL);
    vm->has_throttler = false;
    for (size_t i = 0; i < vm->vcpus; i++) {
        if (!vm->vcpu[i].has_thread)
            continue;
        pthread_join(vm->vcpu[i].thread, NULL);
        pthread_mutex_lock(&vm->run_lock);              /* a pause that comes now finds nobody to wait for */
        vm->vcpu[i].has_thread = false;
        pthread_mutex_unlock(&vm->run_lock);
    }
}
