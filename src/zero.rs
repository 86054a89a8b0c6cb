//! Finds pages of zeros with the widest vector unit the CPU has.
//!
//! The memory is the guest's, so it may change while it is read. Inline assembly reads it, because the compiler sees
//! nothing but its result: it cannot read twice what was judged once, nor assume that nobody else writes, as it may
//! for a load of its own. A page that changes during the test may be judged either way; its write is in the dirty log,
//! because the page's bit was taken before. It also keeps to instructions without a compiler feature, so that one
//! binary runs anywhere.
#![allow(unsafe_code, reason = "reads guest memory")]

use std::sync::OnceLock;

/// Bytes of a page.
const PAGE: usize = 4096;
/// Most pages of one [`mask`].
pub const MASK_PAGES: usize = 64;

/// A way to read many bytes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// 64 bytes.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// 32 bytes.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 16 bytes; every x86-64 has it.
    #[cfg(target_arch = "x86_64")]
    Sse2,
    /// 16 bytes; every 64-bit Arm has it.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// 8 bytes, anywhere.
    Portable,
}

impl Unit {
    /// What this CPU has, widest first.
    pub fn available() -> impl Iterator<Item = Self> {
        [
            #[cfg(target_arch = "x86_64")]
            (std::arch::is_x86_feature_detected!("avx512f"), Self::Avx512),
            #[cfg(target_arch = "x86_64")]
            (std::arch::is_x86_feature_detected!("avx2"), Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            (true, Self::Sse2),
            #[cfg(target_arch = "aarch64")]
            (true, Self::Neon),
            (true, Self::Portable),
        ]
        .into_iter()
        .filter_map(|(there, unit)| there.then_some(unit))
    }

    /// The widest; looked for once.
    #[inline]
    pub fn widest() -> Self {
        static WIDEST: OnceLock<Unit> = OnceLock::new();
        *WIDEST.get_or_init(|| Self::available().next().unwrap_or(Self::Portable))
    }

    /// [`mask`], by this unit.
    ///
    /// # Safety
    /// As for [`mask`], and the CPU has the unit: it is one of [`Self::available`].
    pub unsafe fn mask(self, start: *const u8, pages: usize) -> u64 {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the contract of this function is the callee's.
            Self::Avx512 => unsafe { each_page(start, pages, avx512) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Self::Avx2 => unsafe { each_page(start, pages, avx2) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Self::Sse2 => unsafe { each_page(start, pages, sse2) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Self::Neon => unsafe { each_page(start, pages, neon) },
            // SAFETY: as above.
            Self::Portable => unsafe { each_page(start, pages, portable) },
        }
    }
}

/// Which of up to 64 pages from `start` on read as all zeros just now: bit 0 is the first.
///
/// # Safety
/// `start` is page aligned, and `pages` pages from there are mapped and readable during the call. They may change.
#[inline]
pub unsafe fn mask(start: *const u8, pages: usize) -> u64 {
    // SAFETY: this function's contract, and the unit was found in this CPU.
    unsafe { Unit::widest().mask(start, pages) }
}

/// Whether a page reads as all zeros just now.
///
/// # Safety
/// As for [`mask`], of one page.
#[inline]
pub unsafe fn is_zero(page: *const u8) -> bool {
    // SAFETY: this function's contract is the callee's.
    unsafe { mask(page, 1) != 0 }
}

/// # Safety
/// As for [`mask`], and `is_zero` may be called for pages on this CPU.
#[inline(always)]
unsafe fn each_page(start: *const u8, pages: usize, is_zero: unsafe fn(*const u8) -> bool) -> u64 {
    assert!(pages <= MASK_PAGES, "a mask of more than 64 pages");
    assert!(start.addr() % PAGE == 0, "a mask of pages that are not aligned");
    let mut mask = 0;
    for i in 0..pages {
        let page = start.wrapping_add(i * PAGE);
        // SAFETY: one of the pages the caller promised.
        let may_be = unsafe { begins_with_zero(page) };
        // SAFETY: as above.
        mask |= u64::from(may_be && unsafe { is_zero(page) }) << i;
    }
    mask
}

/// The first word: most pages that are not zero show it there. A look further on would spoil the order in which the CPU
/// fetches ahead.
///
/// # Safety
/// A page can be read at `page`.
#[inline(always)]
unsafe fn begins_with_zero(page: *const u8) -> bool {
    // SAFETY: inside the page and aligned; volatile because it may change under us.
    unsafe { page.cast::<u64>().read_volatile() == 0 }
}

/// # Safety
/// A page can be read at `page`.
#[inline]
unsafe fn portable(page: *const u8) -> bool {
    const LINE: usize = 64;
    (0..PAGE).step_by(LINE).all(|line| {
        let mut any = 0;
        for at in (line..line + LINE).step_by(8) {
            // SAFETY: inside the page and aligned; volatile because it may change under us.
            any |= unsafe { page.wrapping_add(at).cast::<u64>().read_volatile() };
        }
        any == 0
    })
}

/// # Safety
/// A page can be read at `page`; the CPU has AVX-512F.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn avx512(page: *const u8) -> bool {
    let left: usize;
    // SAFETY: reads the 64 lines of the page and changes only the registers named; the CPU has the instructions.
    unsafe {
        std::arch::asm!(
            "2:",
            "vmovdqu64 zmm0, [{at}]",
            "vporq zmm0, zmm0, [{at} + 64]",
            "vporq zmm0, zmm0, [{at} + 128]",
            "vporq zmm0, zmm0, [{at} + 192]",
            "vptestmq k1, zmm0, zmm0",
            "kortestw k1, k1",
            "jnz 3f",
            "add {at}, 256",
            "dec {left}",
            "jnz 2b",
            "3:",
            "vzeroupper",
            at = inout(reg) page => _,
            left = inout(reg) PAGE / 256 => left,
            out("zmm0") _,
            out("k1") _,
            options(nostack, readonly)
        );
    }
    left == 0
}

/// # Safety
/// A page can be read at `page`; the CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn avx2(page: *const u8) -> bool {
    let left: usize;
    // SAFETY: reads the 64 lines of the page and changes only the registers named; the CPU has the instructions.
    unsafe {
        std::arch::asm!(
            "2:",
            "vmovdqu ymm0, [{at}]",
            "vmovdqu ymm1, [{at} + 128]",
            "vpor ymm0, ymm0, [{at} + 32]",
            "vpor ymm1, ymm1, [{at} + 160]",
            "vpor ymm0, ymm0, [{at} + 64]",
            "vpor ymm1, ymm1, [{at} + 192]",
            "vpor ymm0, ymm0, [{at} + 96]",
            "vpor ymm1, ymm1, [{at} + 224]",
            "vpor ymm0, ymm0, ymm1",
            "vptest ymm0, ymm0",
            "jnz 3f",
            "add {at}, 256",
            "dec {left}",
            "jnz 2b",
            "3:",
            "vzeroupper",
            at = inout(reg) page => _,
            left = inout(reg) PAGE / 256 => left,
            out("ymm0") _,
            out("ymm1") _,
            options(nostack, readonly)
        );
    }
    left == 0
}

/// # Safety
/// A page can be read at `page`, aligned to 16 bytes.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn sse2(page: *const u8) -> bool {
    let left: usize;
    // SAFETY: reads the 64 lines of the page and changes only the registers named.
    unsafe {
        std::arch::asm!(
            "pxor xmm2, xmm2",
            "2:",
            "movdqa xmm0, [{at}]",
            "movdqa xmm1, [{at} + 16]",
            "por xmm0, [{at} + 32]",
            "por xmm1, [{at} + 48]",
            "por xmm0, xmm1",
            "pcmpeqb xmm0, xmm2",
            "pmovmskb {bits:e}, xmm0",
            "cmp {bits:e}, 0xffff",
            "jne 3f",
            "add {at}, 64",
            "dec {left}",
            "jnz 2b",
            "3:",
            at = inout(reg) page => _,
            left = inout(reg) PAGE / 64 => left,
            bits = out(reg) _,
            out("xmm0") _,
            out("xmm1") _,
            out("xmm2") _,
            options(nostack, readonly)
        );
    }
    left == 0
}

/// # Safety
/// A page can be read at `page`.
#[cfg(target_arch = "aarch64")]
#[inline]
unsafe fn neon(page: *const u8) -> bool {
    let left: usize;
    // SAFETY: reads the 64 lines of the page and changes only the registers named.
    unsafe {
        std::arch::asm!(
            "2:",
            "ldp q0, q1, [{at}]",
            "ldp q2, q3, [{at}, #32]",
            "orr v0.16b, v0.16b, v1.16b",
            "orr v2.16b, v2.16b, v3.16b",
            "orr v0.16b, v0.16b, v2.16b",
            "umaxp v0.4s, v0.4s, v0.4s",
            "fmov {bits}, d0",
            "cbnz {bits}, 3f",
            "add {at}, {at}, #64",
            "subs {left}, {left}, #1",
            "b.ne 2b",
            "3:",
            at = inout(reg) page => _,
            left = inout(reg) PAGE / 64 => left,
            bits = out(reg) _,
            out("v0") _,
            out("v1") _,
            out("v2") _,
            out("v3") _,
            options(nostack, readonly)
        );
    }
    left == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    #[repr(align(4096))]
    struct Pages([u8; MASK_PAGES * PAGE]);

    fn zeros() -> Box<Pages> {
        Box::new(Pages([0; MASK_PAGES * PAGE]))
    }

    fn mask_of(unit: Unit, memory: &Pages, pages: usize) -> u64 {
        assert!(pages <= MASK_PAGES);
        // SAFETY: aligned, our own, and as long as any mask; the unit is from the list of those available.
        unsafe { unit.mask(memory.0.as_ptr(), pages) }
    }

    #[test]
    fn every_unit_sees_every_byte_of_a_page() {
        let mut memory = zeros();
        for unit in Unit::available() {
            assert_eq!(mask_of(unit, &memory, 3), 0b111, "{unit:?}");
            for at in 0..PAGE {
                memory.0[PAGE + at] = 1 << (at % 8);
                assert_eq!(mask_of(unit, &memory, 3), 0b101, "{unit:?}, byte {at}");
                assert_eq!(mask_of(Unit::Portable, &memory, 3), 0b101, "byte {at}");
                memory.0[PAGE + at] = 0;
            }
        }
    }

    #[test]
    fn every_unit_alone_sees_every_byte() {
        // Without the look at the first, middle and last words, which would hide a loop that ends a line too early.
        type Test = unsafe fn(*const u8) -> bool;
        let test = |unit| -> Test {
            match unit {
                #[cfg(target_arch = "x86_64")]
                Unit::Avx512 => avx512,
                #[cfg(target_arch = "x86_64")]
                Unit::Avx2 => avx2,
                #[cfg(target_arch = "x86_64")]
                Unit::Sse2 => sse2,
                #[cfg(target_arch = "aarch64")]
                Unit::Neon => neon,
                Unit::Portable => portable,
            }
        };
        let mut memory = zeros();
        // What lies beside the page must not matter.
        memory.0[..PAGE].fill(0xff);
        memory.0[2 * PAGE..3 * PAGE].fill(0xff);
        for unit in Unit::available() {
            let mut is_zero = |at: Option<usize>| {
                at.iter().for_each(|at| memory.0[PAGE + at] = 0x80);
                // SAFETY: a page of our own, and a unit this CPU has.
                let zero = unsafe { test(unit)(memory.0[PAGE..].as_ptr()) };
                at.iter().for_each(|at| memory.0[PAGE + at] = 0);
                zero
            };
            assert!(is_zero(None), "{unit:?}");
            for at in 0..PAGE {
                assert!(!is_zero(Some(at)), "{unit:?}, byte {at}");
            }
        }
    }

    #[test]
    fn masks_of_every_length_agree_with_the_pages() {
        let mut memory = zeros();
        let mut want = u64::MAX;
        for page in [0, 3, 31, 32, 33, 62, 63] {
            memory.0[page * PAGE + page * 64 + 9] = 7;
            want &= !(1 << page);
        }
        for unit in Unit::available() {
            for pages in 0..=MASK_PAGES {
                let below = if pages == 64 { u64::MAX } else { (1 << pages) - 1 };
                assert_eq!(mask_of(unit, &memory, pages), want & below, "{unit:?}, {pages} pages");
            }
        }
        assert!(Unit::available().any(|unit| unit == Unit::widest()));
        // SAFETY: two pages of our own.
        assert_eq!(unsafe { mask(memory.0.as_ptr(), 2) }, 0b10);
        // SAFETY: a page of our own.
        assert!(!unsafe { is_zero(memory.0.as_ptr()) });
    }

    #[test]
    #[should_panic(expected = "more than 64 pages")]
    fn no_mask_is_longer_than_its_word() {
        // SAFETY: refused before anything is read.
        let _ = unsafe { mask(zeros().0.as_ptr(), MASK_PAGES + 1) };
    }

    #[test]
    fn a_page_that_changes_is_judged_by_what_stays() {
        // Another thread writes one word all the time, never zero: the page is never zero, the next one always.
        let memory: Vec<AtomicU64> = (0..3 * PAGE / 8).map(|_| AtomicU64::new(0)).collect();
        let skip = memory.as_ptr().cast::<u8>().align_offset(PAGE) / 8;
        let busy = &memory[skip + 300];
        let stop = AtomicBool::new(false);
        busy.store(1, Ordering::SeqCst);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    busy.store(busy.load(Ordering::Relaxed).wrapping_add(2) | 1, Ordering::Relaxed);
                }
            });
            for _ in 0..2000 {
                for unit in Unit::available() {
                    // SAFETY: two whole pages follow the first aligned address in memory of three.
                    let mask = unsafe { unit.mask(memory[skip..].as_ptr().cast(), 2) };
                    assert_eq!(mask, 0b10, "{unit:?}");
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
