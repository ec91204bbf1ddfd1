//! Messages and attributes of netlink, as bytes.

/// `struct nlmsghdr` and `struct nfgenmsg`.
const HEADER: usize = 16;
const GENERIC: usize = 4;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// One message of an answer.
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) payload: &'a [u8],
}

/// A message; `generic` is its address family and resource number.
pub(crate) fn message(
    kind: u16,
    flags: u16,
    sequence: u32,
    generic: (u8, u16),
    attributes: &[u8],
) -> Vec<u8> {
    let length = u32::try_from(HEADER + GENERIC + attributes.len()).expect("bounded by its parts");
    let mut out = Vec::with_capacity(HEADER + GENERIC + attributes.len());
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend([0; 4]);
    out.extend([generic.0, 0]);
    out.extend(generic.1.to_be_bytes());
    out.extend(attributes);
    out
}

/// The messages of a datagram. Ends at the first that is cut off.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
        let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
        let flags = u16::from_ne_bytes(*bytes.get(6..)?.first_chunk()?);
        let sequence = u32::from_ne_bytes(*bytes.get(8..)?.first_chunk()?);
        let payload = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, flags, sequence, payload })
    })
}

/// Appends an attribute.
pub(crate) fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).expect("keys, names and comments are short");
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Appends an attribute of attributes.
pub(crate) fn put_nested(out: &mut Vec<u8>, kind: u16, inside: impl FnOnce(&mut Vec<u8>)) {
    let mut value = Vec::new();
    inside(&mut value);
    put(out, kind | NESTED, &value);
}

/// Appends a text with its closing zero.
pub(crate) fn put_text(out: &mut Vec<u8>, kind: u16, text: &str) {
    // The kernel's names are far shorter, and it refuses what is cut here.
    let mut value = text.as_bytes()[..text.len().min(1024)].to_vec();
    value.push(0);
    put(out, kind, &value);
}

/// All attributes, up to the first that is cut off.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Value of the first attribute of a kind.
pub(crate) fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_messages_end_the_reading() {
        assert_eq!(messages(&[1, 2, 3]).count(), 0);
        assert_eq!(attributes(&[200, 0, 1, 0, 5]).count(), 0);
        // A length of zero must not go round in circles.
        assert_eq!(messages(&[0; 32]).count(), 0);
        assert_eq!(attributes(&[0; 8]).count(), 0);
    }

    #[test]
    fn a_message_reads_back() {
        let mut inside = Vec::new();
        put_nested(&mut inside, 3, |out| put_text(out, 1, "abc"));
        let bytes = message(7, 1, 9, (1, 0), &inside);
        let read = messages(&bytes).next().expect("a message");
        assert_eq!((read.kind, read.flags, read.sequence), (7, 1, 9));
        let nested = attribute(&read.payload[GENERIC..], 3).expect("nested");
        assert_eq!(attribute(nested, 1), Some(&b"abc\0"[..]));
    }
}
