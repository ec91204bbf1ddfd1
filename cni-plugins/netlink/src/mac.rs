//! MACs as people write them.

use crate::MacBytes;

/// `aa:bb:cc:dd:ee:ff`
#[must_use]
pub fn mac_text(mac: MacBytes) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// `aa:bb:cc:dd:ee:ff`, or with dashes.
#[must_use]
pub fn parse_mac(text: &str) -> Option<MacBytes> {
    let mut mac = MacBytes::default();
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let part = parts
            .next()
            .filter(|part| part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// As [`parse_mac`], of one interface: neither of a group nor all zeros.
#[must_use]
pub fn parse_unicast_mac(text: &str) -> Option<MacBytes> {
    parse_mac(text).filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_reads_back_and_other_text_is_none() {
        let mac = [2, 0, 0xab, 0, 0, 9];
        assert_eq!(parse_mac(&mac_text(mac)), Some(mac));
        assert_eq!(parse_mac("02-00-AB-00-00-09"), Some(mac));
        for wrong in
            ["", "02:00:ab:00:00", "02:00:ab:00:00:09:01", "2:0:ab:0:0:9", "+2:00:ab:00:00:09"]
        {
            assert_eq!(parse_mac(wrong), None, "{wrong}");
        }
        assert_eq!(parse_unicast_mac("01:00:5e:00:00:01"), None);
        assert_eq!(parse_unicast_mac("00:00:00:00:00:00"), None);
    }
}
