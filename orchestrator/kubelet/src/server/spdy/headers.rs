//! Header blocks: name and value pairs, compressed by one zlib stream per direction that lasts as long as the
//! connection and starts with a dictionary both sides know (SPDY/3 §2.6.10).

use std::sync::LazyLock;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

use super::frame::FrameError;

/// Longest header block after decompression. A stream of Kubernetes has three or four short headers.
pub(super) const MAX_BLOCK_BYTES: usize = 16 << 10;
/// Most pairs in one block.
const MAX_PAIRS: usize = 256;

/// Words of the dictionary, each of which comes after its length as a 32 bit number.
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language \
    accept-ranges age allow authorization cache-control connection content-base content-encoding content-language \
    content-length content-location content-md5 content-range content-type date etag expect expires from host \
    if-match if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards \
    pragma proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding \
    upgrade user-agent vary via warning www-authenticate method get status 200=OK version HTTP/1.1 url public \
    set-cookie keep-alive origin";
/// What follows the words, without lengths.
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
    203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized\
    403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr \
    May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,\
    image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=\
    gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = Vec::new();
    for word in WORDS.split_ascii_whitespace() {
        // The one word with a space in it.
        let word = word.replace('=', " ");
        bytes.extend(u32::try_from(word.len()).unwrap_or_default().to_be_bytes());
        bytes.extend(word.as_bytes());
    }
    bytes.extend(TAIL.as_bytes());
    bytes
});

/// Headers of a stream, names in lower case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Headers(Vec<(String, String)>);

impl Headers {
    /// The first value of a header, whose name is given in lower case.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(own, _)| own == name);
        found.map(|(_, value)| value.split('\0').next().unwrap_or_default())
    }

    fn parse(block: &[u8]) -> Result<Self, FrameError> {
        let mut rest = block;
        let count = usize::try_from(number(&mut rest)?).unwrap_or(usize::MAX);
        if count > MAX_PAIRS {
            return Err(FrameError::Headers);
        }
        let mut pairs = Vec::new();
        for _ in 0..count {
            let name = text(&mut rest)?.to_ascii_lowercase();
            pairs.push((name, text(&mut rest)?));
        }
        Ok(Self(pairs))
    }

    fn write(&self) -> Vec<u8> {
        let length = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
        let mut block = length(self.0.len()).to_vec();
        for text in self.0.iter().flat_map(|(name, value)| [name, value]) {
            block.extend(length(text.len()));
            block.extend(text.as_bytes());
        }
        block
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Headers {
    fn from(pairs: [(&str, &str); N]) -> Self {
        Self(pairs.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).into())
    }
}

fn number(rest: &mut &[u8]) -> Result<u32, FrameError> {
    let (bytes, after) = rest.split_first_chunk().ok_or(FrameError::Headers)?;
    *rest = after;
    Ok(u32::from_be_bytes(*bytes))
}

fn text(rest: &mut &[u8]) -> Result<String, FrameError> {
    let length = usize::try_from(number(rest)?).map_err(|_| FrameError::Headers)?;
    let (bytes, after) = rest.split_at_checked(length).ok_or(FrameError::Headers)?;
    *rest = after;
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

/// Decompresses the header blocks of one direction.
pub(super) struct Inflater(Decompress);

impl Inflater {
    pub(super) fn new() -> Self {
        Self(Decompress::new(true))
    }

    /// # Errors
    /// The block is no zlib, or too long. No other block can be read after that.
    pub(super) fn headers(&mut self, mut block: &[u8]) -> Result<Headers, FrameError> {
        let mut plain = Vec::with_capacity(1024);
        loop {
            if plain.len() == plain.capacity() {
                plain.reserve(plain.len());
            }
            let (before, length) = (self.0.total_in(), plain.len());
            let done = self.0.decompress_vec(block, &mut plain, FlushDecompress::Sync);
            let read = usize::try_from(self.0.total_in() - before).unwrap_or(usize::MAX);
            block = block.get(read..).unwrap_or_default();
            if plain.len() > MAX_BLOCK_BYTES {
                return Err(FrameError::Headers);
            }
            match done {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&DICTIONARY).map_err(|_| FrameError::Headers)?;
                }
                Err(_) => return Err(FrameError::Headers),
                // Room was left, so nothing more is to come.
                Ok(_) if block.is_empty() && plain.len() < plain.capacity() => break,
                Ok(_) if read == 0 && plain.len() == length => return Err(FrameError::Headers),
                Ok(_) => {}
            }
        }
        Headers::parse(&plain)
    }
}

/// Compresses the header blocks of one direction.
pub(super) struct Deflater(Compress);

impl Deflater {
    pub(super) fn new() -> Self {
        let mut compress = Compress::new(Compression::fast(), true);
        compress.set_dictionary(&DICTIONARY).expect("a new stream takes a dictionary");
        Self(compress)
    }

    pub(super) fn block(&mut self, headers: &Headers) -> Vec<u8> {
        let plain = headers.write();
        let mut rest = plain.as_slice();
        let mut block = Vec::with_capacity(plain.len() + 64);
        loop {
            if block.len() == block.capacity() {
                block.reserve(64);
            }
            let before = self.0.total_in();
            let done = self.0.compress_vec(rest, &mut block, FlushCompress::Sync);
            debug_assert!(done.is_ok(), "compression into memory");
            let read = usize::try_from(self.0.total_in() - before).unwrap_or(usize::MAX);
            rest = rest.get(read..).unwrap_or_default();
            if done.is_err() || (rest.is_empty() && block.len() < block.capacity()) {
                return block;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dictionary_is_that_of_spdy_3() {
        // The checksum that every SPDY/3 zlib stream has in its bytes 2 to 5.
        assert_eq!(Deflater::new().block(&Headers::default())[2..6], [0xe3, 0xc6, 0xa7, 0xc2]);
        assert_eq!(DICTIONARY.len(), 1423);
    }

    #[test]
    fn blocks_come_back_one_after_the_other() {
        let (mut deflater, mut inflater) = (Deflater::new(), Inflater::new());
        for id in 0..50 {
            let long = "x".repeat(id * 37);
            let id = id.to_string();
            let headers =
                Headers::from([("streamType", "data"), ("port", &id), ("requestID", &long)]);
            let read = inflater.headers(&deflater.block(&headers)).expect("a block");
            assert_eq!(read, headers);
            assert_eq!(read.get("streamtype"), Some("data"));
        }
    }

    #[test]
    fn a_block_that_grows_without_end_is_refused() {
        let headers = Headers::from([("a", "x".repeat(1 << 20).as_str())]);
        let block = Deflater::new().block(&headers);
        assert!(block.len() < MAX_BLOCK_BYTES, "{} bytes", block.len());
        assert!(matches!(Inflater::new().headers(&block), Err(FrameError::Headers)));
    }
}
