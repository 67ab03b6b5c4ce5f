//! Settings of the allocator, which it reads before the program's first line runs.

/// What jemalloc is told (jemalloc(3), TUNING; the text ends with a zero). A worker with many requests at once has as many of
/// each size in use and gives them back together: the usual twenty places of a thread's cache for the larger ones, looked
/// through after every 64 KiB, sent most of them the long way (measured: 3,700 of 59,000 instructions per request, at 64
/// requests at a time).
static TEXT: &[u8] = b"tcache_nslots_small_min:64,tcache_gc_incr_bytes:1048576\0";

/// The pointer that it looks for, as it names it.
// SAFETY: nobody else defines the name, and it points to a text that ends with a zero and lives for ever.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static MALLOC_CONF: &u8 = match TEXT.first() {
    Some(first) => first,
    None => &0,
};
