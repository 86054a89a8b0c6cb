/* The ticker: counts in the guest's own time, with a thread of its own.                 SPDX: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "vmm.h"
#include <errno.h>
#include <time.h>

void ticker_set_period(struct machine *vm, uint32_t period_us)
{
    struct ticker *t = &vm->ticker;

    t->period_us = period_us;
    t->expiry = period_us ? migrate_clock_ns(vm) + period_us * 1000ull : TIMER_OFF;
    pthread_cond_signal(&t->changed);
}

static void sleep_until_due(struct machine *vm, uint64_t now)
{
    struct ticker *t = &vm->ticker;
    struct timespec until;
    uint64_t host;

    if (!t->running || t->expiry == TIMER_OFF) {
        pthread_cond_wait(&t->changed, &vm->lock);
        return;
    }
    /* The two clocks run at the same speed while the guest runs, and when it does not, neither do we. */
    host = now_ns() + (t->expiry - now);
    until = (struct timespec){ .tv_sec = (time_t)(host / 1000000000), .tv_nsec = (long)(host % 1000000000) };
    pthread_cond_timedwait(&t->changed, &vm->lock, &until);
}

static void *ticker_thread(void *opaque)
{
    struct machine *vm = opaque;
    struct ticker *t = &vm->ticker;

    pthread_mutex_lock(&vm->lock);
    while (!t->quit) {
        uint64_t now = migrate_clock_ns(vm);
        if (t->running && t->expiry != TIMER_OFF && now >= t->expiry) {
            uint64_t period = t->period_us * 1000ull, missed = (now - t->expiry) / period + 1;
            t->count += (uint32_t)missed;
            t->expiry += missed * period;
        } else {
            sleep_until_due(vm, now);
        }
    }
    pthread_mutex_unlock(&vm->lock);
    return NULL;
}

/* State changes only under the big lock and only while running, so once this returned the ticker stands still. */
void ticker_run(struct machine *vm, bool run)
{
    pthread_mutex_lock(&vm->lock);
    vm->ticker.running = run;
    pthread_cond_signal(&vm->ticker.changed);
    pthread_mutex_unlock(&vm->lock);
}

int ticker_start_thread(struct machine *vm)
{
    return -pthread_create(&vm->ticker.thread, NULL, ticker_thread, vm);
}

void ticker_end_thread(struct machine *vm)
{
    pthread_mutex_lock(&vm->lock);
    vm->ticker.quit = true;
    pthread_cond_signal(&vm->ticker.changed);
    pthread_mutex_unlock(&vm->lock);
    pthread_join(vm->ticker.thread, NULL);
}
