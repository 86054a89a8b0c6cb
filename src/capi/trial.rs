//! For the tests of a VMM: tries a registered device with everything a migration could do to it, and says what is wrong.
//! Nothing is stopped, sent or received, so a test needs a guest with two hooks and the device, and no second process. It is
//! in every build of the library, so that a device is tried with the code that will migrate it.

use std::ffi::{c_char, c_int};

use super::guest::vmig;
use super::{enter, guest, string};
use crate::section::trial::Plan;
use crate::section::trial::ops::vmig_device_test;
use crate::vmm::ops::{VMIG_LOG_DEBUG, VMIG_LOG_ERROR, VMIG_LOG_INFO, VMIG_LOG_WARNING};

/// Tries the device or section that was added with this name and instance. `how` NULL: with nothing but its callbacks.
///
/// What is tried: that it is saved twice alike; that it takes what it was saved as, and is then saved alike, also after a
/// `reset`; that a state which is cut off or has a bit changed, anywhere, is refused or does no harm (the device takes it, can
/// be saved, takes that, and is saved alike); that versions it does not read are refused, and each it reads loads, made from
/// the fields it had then; its parts absent, present, of other versions, and one nobody knows; samples of earlier releases;
/// and that after each of its callbacks has failed once, and after vmig_put() has for lack of memory, it is as good as
/// before and the error names it. For what a device does in its own memory run this with AddressSanitizer: a device that
/// crashes is not caught, and the last DEBUG line of the log names the case. docs/devices-testing.md has more.
///
/// Returns 0 if nothing is wrong. -EBADMSG: something is, the first such thing; vmig_errmsg() names the device, the test
/// and, where it applies, byte, bit and field, bytes counted from the start of what the device was saved as. Either way the
/// device is put back afterwards: loaded from what it was saved as at first, and its `memory` written as it was.
///
/// Until it returns no other thread may use the device or add, remove or migrate anything; the guest must stand still.
/// -ENOENT: there is no such device; -EOPNOTSUPP: it is the library's own (KVM's); -EINVAL: its is_active says no; -EBUSY:
/// the guest runs (vmig_stop() it, or do not start it), or a migration does. \[free\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_test_device(
    m: *mut vmig,
    name: *const c_char,
    instance: u32,
    how: *const vmig_device_test,
) -> c_int {
    enter("vmig_test_device", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract of strings.
        let name = unsafe { string("name", name) }?;
        let levels = [VMIG_LOG_ERROR, VMIG_LOG_WARNING, VMIG_LOG_INFO, VMIG_LOG_DEBUG];
        // SAFETY: the C contract of sized structs, lists and callbacks; the device's memory is of the size given.
        let mut plan = unsafe { Plan::of_c(how, levels) }?;
        machine.try_device(name, instance, &mut plan)?;
        Ok(0)
    })
}
