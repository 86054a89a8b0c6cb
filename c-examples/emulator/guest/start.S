/* Where the machine begins, and where every trap goes.                                  SPDX: MIT OR Apache-2.0 */
        .section .text.start, "ax"
        .globl _start
_start: la      sp, guest_stack_end
        la      t0, trap_direct
        csrw    mtvec, t0
        call    guest_main              /* a0: the hart, a1: bytes of RAM, as the machine left them */
1:      wfi
        j       1b

        /* Keeps what a C function may change, and goes on where guest_trap() says. */
        .section .text
        .align  6
        .globl  trap_direct
trap_direct:
        addi    sp, sp, -64
        sw      ra, 0(sp)
        sw      t0, 4(sp)
        sw      t1, 8(sp)
        sw      t2, 12(sp)
        sw      a0, 16(sp)
        sw      a1, 20(sp)
        sw      a2, 24(sp)
        sw      a3, 28(sp)
        sw      a4, 32(sp)
        sw      a5, 36(sp)
        sw      a6, 40(sp)
        sw      a7, 44(sp)
        sw      t3, 48(sp)
        sw      t4, 52(sp)
        sw      t5, 56(sp)
        sw      t6, 60(sp)
        csrr    a0, mcause
        csrr    a1, mepc
        csrr    a2, mtval
        call    guest_trap
        csrw    mepc, a0
        lw      ra, 0(sp)
        lw      t0, 4(sp)
        lw      t1, 8(sp)
        lw      t2, 12(sp)
        lw      a0, 16(sp)
        lw      a1, 20(sp)
        lw      a2, 24(sp)
        lw      a3, 28(sp)
        lw      a4, 32(sp)
        lw      a5, 36(sp)
        lw      a6, 40(sp)
        lw      a7, 44(sp)
        lw      t3, 48(sp)
        lw      t4, 52(sp)
        lw      t5, 56(sp)
        lw      t6, 60(sp)
        addi    sp, sp, 64
        mret

        .bss
        .align  4
        .skip   8192
guest_stack_end:
