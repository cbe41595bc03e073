# Entry, ring 0, and the way to ring 3. (Intel syntax.)
#
# Everything here is as short as it can be: on a host whose KVM emulates ring 0, each of these instructions costs
# microseconds. Tables are laid out by the assembler or written later from ring 3, which may write all of memory.
#
#   pvh_start (32-bit, no paging; ebx = hvm_start_info) -> long_start -> rust_main in ring 3
#   trampoline (16-bit, at 0x8000, one per SIPI)        -> ap_long    -> ap_user in ring 3 -> rust_ap
#   exception                                           -> common     -> service (asked for by `hlt`), or
#                                                                        fault_user -> rust_fault in ring 3

.set CODE0, 0x08        # ring 0 code, 64-bit
.set DATA0, 0x10        # ring 0 data
.set DATA3, 0x2b        # ring 3 data: the selectors that software KVM expects for native ring 3
.set CODE3, 0x33        # ring 3 code, 64-bit
.set TSS0,  0x38        # the first processor's TSS; each further one 16 bytes on
.set FLAGS3, 0x3002     # IOPL 3: ring 3 may use ports; interrupts stay off
.set PORTS, 0x400       # and these ports by the TSS: software KVM forgets the IOPL when it runs ring 3 natively
.set TSS_LIMIT, 104 + PORTS / 8
.set CR0_BITS, 0x80000033    # PG NE ET MP PE
.set CR4_BITS, 0x620         # OSXMMEXCPT OSFXSR PAE

# ---------------------------------------------------------------------------------------------------------- note
.section .note.Xen, "a", @note
.balign 4
.long 4, 8, 18          # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
.asciz "Xen"
.quad pvh_start

# --------------------------------------------------------------------------------------------- boot processor
.section .text.boot, "ax"
.code32
.global pvh_start
pvh_start:
    cli
    cld
    mov dword ptr [boot_start_info], ebx
    lgdt [gdt_pointer]
    # The TSS descriptor's base is scattered over it, which no relocation can express.
    lea eax, [tss0]
    mov word ptr [gdt + TSS0 + 2], ax
    shr eax, 16
    mov byte ptr [gdt + TSS0 + 4], al
    mov byte ptr [gdt + TSS0 + 7], ah
    mov eax, CR4_BITS
    mov cr4, eax
    lea eax, [pml4]
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100       # EFER.LME
    wrmsr
    mov eax, CR0_BITS
    mov cr0, eax
    .byte 0xea          # ljmp CODE0:long_start
    .long long_start
    .word CODE0

.code64
long_start:
    mov eax, DATA3
    mov ds, eax
    mov es, eax
    lidt [idt_pointer]
    mov eax, TSS0
    ltr ax
    lea rsp, [boot_frame]
    iretq

# ------------------------------------------------------------------------------------------ further processors
.code16
.global trampoline
trampoline:
    cli
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16    # lgdtd [trampoline_gdt - trampoline]
    .word trampoline_gdt - trampoline
    mov eax, CR4_BITS
    mov cr4, eax
    .byte 0x66, 0xa1    # mov eax, [trampoline_cr3 - trampoline]
    .word trampoline_cr3 - trampoline
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, CR0_BITS        # from real mode to long mode at once
    mov cr0, eax
    .byte 0x66, 0xea    # ljmp CODE0:ap_long
    .long ap_long
    .word CODE0
.balign 8
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_cr3:
    .long pml4
.global trampoline_end
trampoline_end:

.code64
ap_long:
    mov eax, DATA3
    mov ds, eax
    mov es, eax
    lidt [idt_pointer]
    mov ebx, 1
    lock xadd dword ptr [ap_next], ebx
    cmp ebx, dword ptr [ap_count]
    jae park            # more processors than the command line names
    mov eax, ebx
    shl eax, 4
    add eax, TSS0 + 16
    ltr ax
    lea rsp, [ap_frame]
    iretq
park:
    cli
    hlt
    jmp park

ap_user:                # ring 3; ebx counts from 0, ranks from 1
    mov rsp, qword ptr [ap_stacks + rbx * 8]
    lea edi, [ebx + 1]
    xor ebp, ebp
    call rust_ap
    ud2

boot_user:              # ring 3
    lea rsp, [boot_stack_top]
    mov edi, dword ptr [boot_start_info]
    xor ebp, ebp
    call rust_main
    ud2

# --------------------------------------------------------------------------------------------------- exceptions
# Sixteen bytes per vector, so that rust_main can compute the gates.
.balign 16
.global stubs
stubs:
.set vector, 0
.rept 32
    .balign 16
    .if (vector != 8) && (vector != 10) && (vector != 11) && (vector != 12) && (vector != 13) && (vector != 14) && (vector != 17) && (vector != 21) && (vector != 29) && (vector != 30)
    push 0              # no error code by itself
    .endif
    push vector
    jmp common
    .set vector, vector + 1
.endr

common:                 # rsp: vector, error code, rip, cs, rflags, rsp, ss
    cmp qword ptr [rsp + 16], offset service_hlt
    je service
    mov edi, dword ptr [rsp]
    mov rsi, qword ptr [rsp + 16]
    mov rdx, qword ptr [rsp + 8]
    mov rcx, cr2
    lea rsp, [fault_frame]
    iretq               # report from ring 3, where nothing is emulated

fault_user:
    lock bts dword ptr [fault_lock], 0
    jc fault_wait       # another processor reports and shuts down
    lea rsp, [fault_stack_top]
    xor ebp, ebp
    call rust_fault
    ud2
fault_wait:
    pause
    jmp fault_wait

# `hlt` is not allowed in ring 3: the fault at this very instruction is how ring 3 asks for what only ring 0 can do.
# esi says what: 0 shut down, else write edx:eax to MSR ecx after or-ing what is there if esi is 2.
.global service_call
service_call:
service_hlt:
    hlt
    ret
service:
    test esi, esi
    jz triple_fault
    cmp esi, 1
    je service_write
    mov edi, eax
    rdmsr
    or eax, edi
service_write:
    wrmsr
    inc qword ptr [rsp + 16]    # past the hlt
    add rsp, 16
    iretq
triple_fault:
    lidt [no_idt]
    ud2

# -------------------------------------------------------------------------------------------------------- tables
.section .data.boot, "aw"
.balign 4096
.global pml4
pml4:
    .quad pdpt + 0x27   # present, writable, user, accessed
    .fill 511, 8, 0
pdpt:                   # the first 4 GiB as they are
    .quad pd + 0x27, pd + 0x1027, pd + 0x2027, pd + 0x3027
    .fill 508, 8, 0
pd:
.set page, 0
.rept 2048
    .quad (page << 21) + 0xe7   # 2 MiB, dirty, accessed, user, writable, present
    .set page, page + 1
.endr

.balign 16
.global gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # CODE0
    .quad 0x00cf93000000ffff    # DATA0
    .quad 0, 0
    .quad 0x00cff3000000ffff    # DATA3
    .quad 0x00affb000000ffff    # CODE3
    .quad 0x0000890000000000 + TSS_LIMIT, 0     # TSS0; the base is written at the start
    .fill 2 * 63, 8, 0          # and those of the other processors
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 32 * 16 - 1
    .quad idt
no_idt:
    .word 0
    .quad 0
.balign 16
boot_frame:
    .quad boot_user, CODE3, FLAGS3, boot_stack_top, DATA3
ap_frame:
    .quad ap_user, CODE3, FLAGS3, 0, DATA3
fault_frame:
    .quad fault_user, CODE3, FLAGS3, fault_stack_top, DATA3
tss0:
    .long 0
    .quad ring0_stack_top
    .fill 90, 1, 0
    .word 104           # where the port bitmap begins: all allowed, and the byte of ones that ends it
    .fill PORTS / 8, 1, 0
    .byte 0xff
.balign 8
boot_start_info:
    .quad 0
.global ap_next, ap_count, ap_stacks
ap_next:
    .long 0
ap_count:
    .long 0
fault_lock:
    .long 0

.section .bss.boot, "aw", @nobits
.balign 16
.global idt
idt:
    .skip 32 * 16
ap_stacks:
    .skip 64 * 8
.balign 16
    .skip 4096
ring0_stack_top:
    .skip 16384
fault_stack_top:
    .skip 327680        # the largest frame is that of over_strips, nas/src/team.rs
boot_stack_top:
