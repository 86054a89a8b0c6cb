//! Everything begins with a guest: a handle made from the VMM's hooks, and the pointer they are called with.

/// Version of the library at run time: major << 16 | minor << 8 | patch. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub extern "C" fn vmig_version() -> u32 {
    const fn number(digits: &str) -> u32 {
        let (mut value, mut i) = (0, 0);
        while i < digits.len() {
            value = value * 10 + (digits.as_bytes()[i] - b'0') as u32;
            i += 1;
        }
        value
    }
    const {
        number(env!("CARGO_PKG_VERSION_MAJOR")) << 16
            | number(env!("CARGO_PKG_VERSION_MINOR")) << 8
            | number(env!("CARGO_PKG_VERSION_PATCH"))
    }
}
