/* The guest's flat image, carried inside the VMM. */
    .section .rodata
    .globl guest_image, guest_image_end
guest_image:
    .incbin GUEST_BIN
guest_image_end:
    .section .note.GNU-stack, "", @progbits
