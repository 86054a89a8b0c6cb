/* A small KVM virtual machine monitor.                                                  SPDX: MIT OR Apache-2.0
 *
 * machine.c  RAM, the VM, what the guest finds at boot      devices.c  the serial port, the probe, port dispatch
 * vcpu.c     vCPU threads: run, handle exits, pause         ticker.c   the device with a timer on the guest's clock
 * migrate.c  everything that has to do with vmig            hash.c     a file with one hash per guest page
 * main.c     options and the line protocol                  guest.c    what runs inside
 * firmware.c a machine for a firmware image instead */
#ifndef VMM_H
#define VMM_H
#include "guest.h"
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { RAM_BLOCKS = 2 };
enum { EXIT_GUEST_FAULT = 3, EXIT_VMM_FAULT = 4 };      /* the guest found an error; the VMM or KVM did */
#define TIMER_OFF UINT64_MAX

struct ram_block {
    const char *name;
    uint8_t *host;
    uint64_t len, gpa;
    int fd;                                             /* the memfd, or -1 for anonymous memory */
    uint32_t slot;
};

struct uart {                                           /* a polled 16550: no interrupts, no FIFO on the way out */
    uint8_t ier, fcr, lcr, mcr, scratch, dll, dlm;
    uint8_t rx_count;
    uint8_t rx[16];
};

struct ticker {                                         /* guarded by the big lock */
    uint32_t period_us, count;
    uint64_t expiry;                                    /* guest clock in ns, or TIMER_OFF */
    bool running, quit;                                 /* of the VMM, not of the guest: do not migrate */
    pthread_cond_t changed;
    pthread_t thread;
};

struct probe {                                          /* one per vCPU: reports arrive word by word */
    uint32_t word[PROBE_WORDS];
    uint32_t words;
    uint32_t generation;
    uint64_t verified;                                  /* pages, since the guest was born */
};

struct machine;
struct kvm_run;
struct vcpu {
    struct machine *vm;
    unsigned index;
    int fd;
    struct kvm_run *run;
    bool parked;                                        /* guarded by run_lock */
    bool has_thread;
    pthread_t thread;
    struct probe probe;
};

struct machine {
    int kvm_fd, vm_fd;
    size_t run_size, vcpus;
    struct vcpu vcpu[GUEST_MAX_VCPUS];
    struct ram_block ram[RAM_BLOCKS];
    struct uart uart;
    struct ticker ticker;
    pthread_mutex_t lock;                               /* the big lock: every device's state */
    pthread_mutex_t run_lock;                           /* may the vCPUs run? Taken alone, or inside the big lock */
    pthread_cond_t run_changed;
    bool paused, quit;
    unsigned throttle;                                  /* percent of the time that the vCPUs stand still */
    bool napping;                                       /* they do just now */
    bool has_throttler;
    pthread_t throttler;
    int serial_fd;
    _Atomic int events_fd;                              /* -1: nobody watches; vCPUs write without the big lock */
    const char *hash_at_start;                          /* file for the page hashes of a guest that just arrived */
    struct vmig *migration;
    int quit_fd;                                        /* readable: somebody said quit over QMP */
};

struct firmware {
    size_t len;                                         /* whole pages */
    uint8_t bytes[64 * 1024];
};
#define RAM_LOW_MAX 0xc0000000ull                       /* the PCI hole lies between here and 4 GiB */
#define FIRMWARE_LOW_END 0x100000ull
#define FIRMWARE_END 0x100000000ull

struct cpu_config {                                     /* what the guest finds different from the host's CPU */
    uint32_t tsc_khz;                                   /* 0: as the host */
    bool hides;                                         /* a bit of CPUID: leaf, subleaf, register (0: eax), bit */
    uint32_t hidden[4];
};

struct machine_config {
    uint64_t mem_bytes;
    unsigned vcpus;
    struct cpu_config cpu;
    bool shared, huge;
    unsigned ring;                                      /* entries of each vCPU's dirty ring; 0: KVM's dirty log */
    const struct firmware *firmware;                    /* NULL: a machine for the built-in guest */
};

enum machine_fill { FILL_UNTOUCHED, FILL_ZERO, FILL_PATTERN, FILL_RANDOM };

/* machine.c */
int machine_create(struct machine *vm, const struct machine_config *config);
int machine_boot(struct machine *vm, const struct boot_info *knobs, enum machine_fill fill, unsigned tick_us);
void machine_destroy(struct machine *vm);
uint8_t *machine_host(struct machine *vm, uint64_t gpa);        /* NULL where there is no RAM */
void machine_die(int status, const char *format, ...) __attribute__((format(printf, 2, 3), noreturn));

/* firmware.c */
int firmware_read(struct firmware *firmware, const char *path);
void firmware_blocks(struct machine *vm, const struct machine_config *config);
void firmware_boot(struct machine *vm, const struct firmware *firmware);

/* vcpu.c */
int vcpu_create(struct machine *vm, unsigned index, const struct cpu_config *cpu);
int vcpus_start_threads(struct machine *vm);                    /* they park at once: a machine is born paused */
void vcpus_end_threads(struct machine *vm);
int machine_pause(struct machine *vm);          /* returns when no vCPU and no device runs; big lock not held */
int machine_resume(struct machine *vm);
void machine_throttle(struct machine *vm, unsigned percent);    /* at most 99; 0: full speed */

/* devices.c */
uint32_t port_in(struct vcpu *vcpu, uint16_t port, unsigned size);
void port_out(struct vcpu *vcpu, uint16_t port, unsigned size, uint32_t value);
void uart_type(struct machine *vm, const char *text);           /* big lock held */
void event_line(struct machine *vm, const char *format, ...) __attribute__((format(printf, 2, 3)));
uint64_t now_ns(void);                                          /* CLOCK_MONOTONIC */

/* ticker.c */
int ticker_start_thread(struct machine *vm);
void ticker_end_thread(struct machine *vm);
void ticker_run(struct machine *vm, bool run);                  /* big lock not held */
void ticker_set_period(struct machine *vm, uint32_t period_us); /* big lock held */

/* hash.c */
int hash_write(const struct machine *vm, const char *path);

/* migrate.c */
int migrate_setup(struct machine *vm);
void migrate_teardown(struct machine *vm);
int migrate_command(struct machine *vm, const char *verb, const char *argument);        /* -ENOENT: not ours */
int migrate_listen(struct machine *vm, const char *uri);
int migrate_serve(struct machine *vm, const char *uri);                 /* QMP */
int migrate_set(struct machine *vm, const char *name_and_value);       /* an option of the library, "NAME VALUE" */
const char *migrate_error(void);                                        /* why this thread's last call failed */
int migrate_pause(struct machine *vm);
int migrate_resume(struct machine *vm);
int migrate_event_fd(struct machine *vm);
void migrate_events(struct machine *vm);
uint64_t migrate_clock_ns(struct machine *vm);
void migrate_ring_full(struct machine *vm, unsigned vcpu);
#endif
