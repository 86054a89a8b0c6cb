/* The guest of the benchmark: a firmware image of 64 KiB for any VMM that maps it below 4 GiB and below 1 MiB.
 *                                                                                       SPDX: MIT OR Apache-2.0
 * From the reset vector to ring 3 of long mode; there it fills its memory, then writes BURST pages per tick, round and
 * round over HOT_PAGES pages from HOT_BASE on, and says so with one byte on port 0xe9 per tick. It runs in ring 3
 * because that is full speed even where KVM emulates ring 0. Page tables and descriptors are part of the image, with
 * accessed and dirty bits set, so that no processor ever wants to write to what may be read-only memory.
 *
 * Knobs (-D): FILL 0 leave memory alone, 1 write zeros, 2 write random numbers; RAM_END; HOT_PAGES; BURST; TICK_TSC. */
#define IMAGE       0xf0000             /* where it runs, whichever copy the reset vector was fetched from */
#define AT(label)   (IMAGE + label - image)
#define FILL_BASE   0x100000
#define HOT_BASE    0x1000000
#define STACK       0x8000
#define PORT_BEAT   0xe9
#define CODE32      0x08
#define DATA32      0x10
#define CODE64      0x18
#define USER_CODE   (0x20 | 3)
#define USER_DATA   (0x28 | 3)

    .text
image:
    .code16
from_reset:
    cli
    cld
    lgdtl   %cs:(descriptors_at - image)
    movl    $0x11, %eax                 /* protected mode */
    movl    %eax, %cr0
    ljmpl   $CODE32, $AT(protected)

    .code32
protected:
    movl    $DATA32, %eax
    movl    %eax, %ds
    movl    %eax, %es
    movl    %eax, %ss
    movl    $STACK, %esp
    /* At reset the task register points to address 0. Zeros there are an I/O bitmap that allows ring 3 every port,
       also on hosts that lose the I/O privilege level of a guest's ring 3. */
    xorl    %eax, %eax
    xorl    %edi, %edi
    movl    $0x3000 / 4, %ecx
    rep stosl
    movl    $0x20, %eax                 /* physical address extension */
    movl    %eax, %cr4
    movl    $AT(pml4), %eax
    movl    %eax, %cr3
    movl    $0xc0000080, %ecx           /* EFER: long mode */
    rdmsr
    orl     $0x100, %eax
    wrmsr
    movl    $0x80000011, %eax           /* paging */
    movl    %eax, %cr0
    ljmpl   $CODE64, $AT(long_mode)

    .code64
long_mode:
    movl    $STACK, %esp
    pushq   $USER_DATA
    pushq   $STACK
    pushq   $0x3002                     /* flags: I/O privilege level 3 */
    pushq   $USER_CODE
    pushq   $AT(user)
    iretq

user:
#if FILL
    movl    $FILL_BASE, %edi
    movabsq $RAM_END, %rsi
    movabsq $0x9e3779b97f4a7c15, %rax
    xorl    %ecx, %ecx
fill:
#if FILL == 2                           /* xorshift: never zero, never twice the same page */
    movq    %rax, %rcx
    shlq    $13, %rcx
    xorq    %rcx, %rax
    movq    %rax, %rcx
    shrq    $7, %rcx
    xorq    %rcx, %rax
    movq    %rax, %rcx
    shlq    $17, %rcx
    xorq    %rax, %rcx
    movq    %rcx, %rax
#endif
    movq    %rcx, (%rdi)
    addq    $8, %rdi
    cmpq    %rsi, %rdi
    jb      fill
#endif
    movl    $HOT_BASE, %edi
    movl    $1, %ebx                    /* what is written: the number of the pass */
    rdtsc
    shlq    $32, %rdx
    leaq    (%rax,%rdx), %r12           /* when the next tick is due */
tick:
    movl    $BURST, %ecx
write:
    movq    %rbx, (%rdi)
    addq    $4096, %rdi
    cmpq    $(HOT_BASE + HOT_PAGES * 4096), %rdi
    jb      1f
    movl    $HOT_BASE, %edi
    incq    %rbx
1:  decl    %ecx
    jnz     write
    addq    $TICK_TSC, %r12
wait:
    rdtsc
    shlq    $32, %rdx
    addq    %rdx, %rax
    movq    %rax, %rdx
    subq    %r12, %rdx
    js      wait
    cmpq    $(TICK_TSC * 8), %rdx       /* far behind: lost ticks are not made up for */
    cmovaq  %rax, %r12
    movb    $'.', %al
    outb    %al, $PORT_BEAT
    jmp     tick

    .balign 8
descriptors:
    .quad   0
    .quad   0x00cf9b000000ffff          /* code, 32 bits */
    .quad   0x00cf93000000ffff          /* data */
    .quad   0x00af9b000000ffff          /* code, 64 bits */
    .quad   0x00affb000000ffff          /* the same for ring 3 */
    .quad   0x00cff3000000ffff          /* data for ring 3 */
descriptors_end:
descriptors_at:
    .word   descriptors_end - descriptors - 1
    .long   AT(descriptors)

    /* 4 GiB one to one, in pages of 2 MiB: present, writable, user, accessed; leaves also dirty and large. */
    .balign 4096
pml4:
    .quad   AT(pdpt) + 0x27
    .balign 4096
pdpt:
    .quad   AT(directories) + 0x27, AT(directories) + 0x1027, AT(directories) + 0x2027, AT(directories) + 0x3027
    .balign 4096
directories:
    .set    page, 0
    .rept   4 * 512
    .quad   page + 0xe7
    .set    page, page + 0x200000
    .endr

    .org    0xfff0
    .code16
reset:
    ljmp    $(IMAGE >> 4), $(from_reset - image)
    .org    0x10000
