//! Where the calling thread is: return addresses as offsets into this program. They cost microseconds and no memory;
//! names of functions in the running process cost tens of MiB for good (measured).

use std::ffi::{c_int, c_void};

// The unwinder that every Rust program with `panic = "unwind"` is linked with (Itanium C++ ABI, level I).
unsafe extern "C" {
    fn _Unwind_Backtrace(step: extern "C" fn(*mut c_void, *mut c_void) -> c_int, walk: *mut c_void) -> c_int;
    fn _Unwind_GetIP(frame: *mut c_void) -> usize;
}

/// `_URC_NO_REASON` and `_URC_END_OF_STACK`.
const GO_ON: c_int = 0;
const ENOUGH: c_int = 5;

/// The program's own part of the address space.
#[derive(Clone, Copy, Debug, Default)]
struct Module {
    base: usize,
    bytes: usize,
}

struct Walk<'a> {
    module: Module,
    offsets: &'a mut [usize],
    count: usize,
}

/// Fills `offsets` with the calls that led here, innermost first, each as its distance from the start of the program's
/// file (what `addr2line -e evergate` takes); gives how many there are. Frames of shared libraries are left out.
/// Allocates nothing.
pub fn call_offsets(offsets: &mut [usize]) -> usize {
    let mut walk = Walk { module: own_module(), offsets, count: 0 };
    // SAFETY: `step` is called on this thread before the call returns, with the pointer given here, which is to a live
    // `Walk` that nobody else uses meanwhile.
    unsafe { _Unwind_Backtrace(step, (&raw mut walk).cast()) };
    walk.count
}

extern "C" fn step(frame: *mut c_void, walk: *mut c_void) -> c_int {
    // SAFETY: the unwinder passes on the pointer that `call_offsets` gave it, to its own `Walk`.
    let walk = unsafe { &mut *walk.cast::<Walk<'_>>() };
    // SAFETY: `frame` is the unwinder's, valid during this call.
    let address = unsafe { _Unwind_GetIP(frame) };
    let Some(slot) = walk.offsets.get_mut(walk.count) else { return ENOUGH };
    let offset = address.wrapping_sub(walk.module.base);
    if offset < walk.module.bytes {
        // The call itself is before the address that it returns to.
        *slot = offset.saturating_sub(1);
        walk.count += 1;
    }
    GO_ON
}

fn own_module() -> Module {
    let mut module = Module::default();
    // SAFETY: `see` is called on this thread before the call returns, with the pointer given here, to a live `Module`.
    unsafe { libc::dl_iterate_phdr(Some(see), (&raw mut module).cast()) };
    module
}

/// Sees the first module, which is the program itself (dl_iterate_phdr(3)), and no other.
unsafe extern "C" fn see(info: *mut libc::dl_phdr_info, _size: usize, module: *mut c_void) -> c_int {
    // SAFETY: both pointers are valid during this call: the first is the loader's, the second from `own_module`.
    let (info, module) = unsafe { (&*info, &mut *module.cast::<Module>()) };
    module.base = usize::try_from(info.dlpi_addr).unwrap_or(0);
    for number in 0..usize::from(info.dlpi_phnum) {
        // SAFETY: there are `dlpi_phnum` headers from `dlpi_phdr` on.
        let header = unsafe { &*info.dlpi_phdr.add(number) };
        if header.p_type == libc::PT_LOAD {
            let end = header.p_vaddr.saturating_add(header.p_memsz);
            module.bytes = module.bytes.max(usize::try_from(end).unwrap_or(0));
        }
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_that_led_here_are_in_this_program() {
        let mut offsets = [0; 32];
        let count = call_offsets(&mut offsets);
        assert!(count > 3, "{count}");
        let module = own_module();
        assert!(offsets[..count].iter().all(|offset| *offset > 0 && *offset < module.bytes), "{offsets:x?}");
        // One of them is this function.
        let here = (the_calls_that_led_here_are_in_this_program as *const () as usize) - module.base;
        assert!(offsets[..count].iter().any(|offset| (here..here + 4096).contains(offset)), "{here:x} {offsets:x?}");
    }

    #[test]
    fn no_more_than_there_is_room_for() {
        assert_eq!(call_offsets(&mut [0; 2]), 2);
        assert_eq!(call_offsets(&mut []), 0);
    }
}
