/* What both guests need: the machine's registers, and words on the console.              SPDX: MIT OR Apache-2.0 */
#ifndef GUEST_H
#define GUEST_H
#include <stdbool.h>
#include <stdint.h>

#define UART ((volatile uint8_t *)0x10000000)
#define CLINT(offset) (*(volatile uint32_t *)(0x02000000 + (offset)))
#define MSIP CLINT(0)
#define MTIMECMP_LOW CLINT(0x4000)
#define MTIMECMP_HIGH CLINT(0x4004)
#define MTIME_LOW CLINT(0xbff8)
#define MTIME_HIGH CLINT(0xbffc)
#define POWER (*(volatile uint32_t *)0x00100000)
#define GUEST_FREE 0x80010000u          /* memory from here on is not the program's */

#define INTERRUPT 0x80000000u
#define IRQ_SOFTWARE (1u << 3)
#define IRQ_TIMER (1u << 7)
#define IRQ_EXTERNAL (1u << 11)
#define MSTATUS_MIE (1u << 3)

#define csr_get(name) ({ uint32_t value_; __asm__ volatile("csrr %0, " #name : "=r"(value_) : : "memory"); value_; })
#define csr_put(name, value) ({ __asm__ volatile("csrw " #name ", %0" : : "r"((uint32_t)(value)) : "memory"); })
#define csr_set(name, value) ({ __asm__ volatile("csrs " #name ", %0" : : "r"((uint32_t)(value)) : "memory"); })
#define csr_clear(name, value) ({ __asm__ volatile("csrc " #name ", %0" : : "r"((uint32_t)(value)) : "memory"); })
#define wait_for_interrupt() __asm__ volatile("wfi" : : : "memory")

/* Each guest has its own. Returns where to go on. */
uint32_t guest_trap(uint32_t cause, uint32_t epc, uint32_t value);
void guest_main(uint32_t hart, uint32_t ram_bytes);

static inline void put(char c)
{
    while (!(UART[5] & 0x20))
        continue;
    UART[0] = (uint8_t)c;
}

static inline void put_text(const char *text)
{
    while (*text)
        put(*text++);
}

static inline void put_number(uint32_t value)
{
    if (value >= 10)
        put_number(value / 10);
    put((char)('0' + value % 10));
}

static inline void put_hex(uint32_t value)
{
    put_text("0x");
    for (int shift = 28; shift >= 0; shift -= 4)
        put("0123456789abcdef"[value >> shift & 15]);
}

static inline _Noreturn void power_off(uint16_t code)
{
    POWER = code ? 0x3333 | (uint32_t)code << 16 : 0x5555;
    for (;;)
        wait_for_interrupt();
}

static inline uint64_t time_now(void)
{
    uint32_t high, low;

    do
        high = MTIME_HIGH, low = MTIME_LOW;
    while (high != MTIME_HIGH);
    return (uint64_t)high << 32 | low;
}

static inline void set_alarm(uint64_t when)
{
    MTIMECMP_HIGH = UINT32_MAX;         /* or it might go off between the two halves */
    MTIMECMP_LOW = (uint32_t)when;
    MTIMECMP_HIGH = (uint32_t)(when >> 32);
}
#endif
